"""Put a trained head into the package: `python -m recipes.demo.export_head HEAD qwen-head`.

HEAD is a folder as `specvlm train` leaves it. The head alone is copied, without the training state, with a card
that says what it is, how it was trained and what was reached on the way. Nothing is trained or measured here.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, get_args

from recipes.demo.export import WEIGHTS
from specvlm.packaged import HeadName

_FILES: Final = ("model.safetensors", "config.json")
_CARD: Final = """---
license: apache-2.0
library_name: specvlm
---

# specvlm demo: {name}

A trained draft head for `{target}`: one decoder layer that reads the target's own features and guesses what it
writes next. It ships with `specvlm` as `--preset {preset}`, so that heads can be tried and tested anywhere.

- {parameters:,} parameters in {stored}, in `model.safetensors`; embeddings and LM head are the target's own.
- Compressor in front of its prefill: {compressor}.
- It fits a target with the content hash `{fingerprint}` (weights and config.json) and refuses every other.

## What it is not

Its target has seen nothing but clips drawn by `recipes/demo/clips.py`, and so has this head. It holds no weights of
any published model. What it gains says how well the loop works, not what a head gains on a large target.

## How it was trained

By `specvlm train`, on {train_samples:,} samples (clip and prompt) of the set `head`, which no demo model has been
trained on, captioned by the target itself: {steps:,} steps of {accumulate} samples, learning rate {learning_rate:g},
unroll {unroll}, loss {cross_entropy:g} x cross-entropy + {smooth_l1:g} x smooth L1, seed {seed}. Commands, times and
the machine: `docs/demo-models.md` in the repository.

## What was reached

On {held_out:,} held-out captions of that training, from which the best head was chosen, with the dynamic tree of 60
nodes and depth 7: **{mean_accepted_tokens:.2f}** accepted tokens a round (accepted / rounds, the bonus not counted).
What it does on clips that nothing was chosen by is in `docs/benchmarks.md`.
"""
_PRESETS: Final[dict[HeadName, str]] = {
    "qwen-head": "demo-head",
    "llava-head": "demo-head-llava",
    "qwen3-head": "demo-head-qwen3-vl",
}


def card(name: HeadName, config: Mapping[str, Any], header: Mapping[str, Any]) -> str:
    """The model card of one head, from its config and the header of its weights."""
    training, reached = config["training"], config["training"]["reached"]
    tensors = [tensor for key, tensor in header.items() if key != "__metadata__"]
    return _CARD.format(
        **{key: value for key, value in training.items() if key != "reached"},
        name=name,
        preset=_PRESETS[name],
        target=config["target"],
        fingerprint=config["target_fingerprint"],
        parameters=sum(math.prod(tensor["shape"]) for tensor in tensors),
        stored={"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[tensors[0]["dtype"]],
        compressor=_compressor(config["compressor"]),
        steps=reached["step"],
        held_out=reached["held_out"],
        mean_accepted_tokens=reached["mean_accepted_tokens"],
    )


def _compressor(config: Mapping[str, Any]) -> str:
    """In words."""
    if config["mode"] == "none":
        return "none"
    operators = ", ".join(f"`{name}`" for name in config["operators"])
    mode = "" if config["mode"] == "single" else f"`{config['mode']}` of "
    return f"{mode}{operators}, ratio {config['ratio']:g}"


def export_head(head: Path, name: HeadName, weights: Path = WEIGHTS) -> int:
    """Copy one head into the package and write its card; returns its size in bytes.

    Raises:
        ValueError: It was made for another target.
    """
    config = json.loads((head / "config.json").read_text(encoding="utf-8"))
    target = f"specvlm-demo/{name.replace('head', 'target')}"
    if config["target"] != target:
        raise ValueError(
            f"{head} is a head of {config['target']}, not of {target}; train one with its preset"
        )
    folder = weights / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in _FILES:
        shutil.copyfile(head / file, folder / file)
    (folder / "README.md").write_text(card(name, config, _header(head / "model.safetensors")))
    return sum(file.stat().st_size for file in folder.iterdir())


def _header(weights: Path) -> dict[str, Any]:
    """Names, shapes and number formats of the tensors in a safetensors file."""
    with weights.open("rb") as file:
        header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return header


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m recipes.demo.export_head", description=__doc__)
    parser.add_argument("head", type=Path)
    parser.add_argument("name", choices=get_args(HeadName))
    options = parser.parse_args(argv)
    try:
        size = export_head(options.head, options.name)
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"{options.head}: cannot be exported ({error})") from None
    print(f"{options.name}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
