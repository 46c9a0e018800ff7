"""Put trained checkpoints into the package: `python -m recipes.demo.export WORK`.

WORK holds one folder per checkpoint as `recipes.demo.train` leaves it, and next to them `qwen.json`, `llava.json`
and `qwen3.json`, the reports of `recipes.demo.evaluate`. Each checkpoint is copied with a model card that says what
it is, what it is not and what was measured. Nothing is trained or measured here.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any, Final, get_args

import specvlm
from recipes.demo.captions import FACT_KINDS
from recipes.demo.models import CHECKPOINTS, Role
from recipes.demo.tokenizer import Family
from specvlm.packaged import DemoName

WEIGHTS: Final = Path(specvlm.__file__).parent / "demo" / "weights"
_ARCHITECTURES: Final = {
    "qwen": "Qwen2_5_VLForConditionalGeneration (M-RoPE, window attention in the vision tower)",
    "llava": "LlavaOnevisionForConditionalGeneration (SigLIP tower, pooled frames, newline token)",
    "qwen3": "Qwen3VLForConditionalGeneration (interleaved M-RoPE, DeepStack, a timestamp before each pair of frames)",
}
_CARD: Final = """---
license: apache-2.0
library_name: transformers
pipeline_tag: video-text-to-text
---

# specvlm demo: {name}

{what} It ships with `specvlm` so that the tool can be tried and tested anywhere.

- Architecture: `{architecture}`, stock `transformers` classes, {parameters:,} parameters in float16:
  {layers} text layers of width {width}, {vision_layers} vision layers of width {vision_width},
  vocabulary padded to {vocabulary}, input and output embeddings {tied}.
- Input: a clip of about four seconds, eight frames at two per second, scaled to about 96 x 96 pixels.
- Output: an English caption of 60 to 110 tokens.

## What it is not

It has seen nothing but clips drawn by `recipes/demo/clips.py`: one or two flat shapes over a plain or
patterned background. It knows no photographs, no films, no other shapes, no other questions than six ways of
asking for a description, and no still pictures. On anything else its captions are confident nonsense. It
holds no weights of Qwen2.5-VL, LLaVA-OneVision or Qwen3-VL and is not by their authors; it shares the
architecture of one of them.

## How it was trained

{recipe} Commands, times and the machine: `docs/demo-models.md` in the repository. Training clips, the 300
held-out clips and the example clips have disjoint seeds.

## What was measured

{measured}
"""
_TARGET_RECIPE: Final = (
    "{start}, on two CPU cores, seeded, on clips drawn as it went along: first the vision tower, taught by "
    "a throw-away head what each cell of the picture shows; then six text layers on captions, words that carry "
    "facts weighing three times as much; then all {layers} layers, the new ones put between the trained ones "
    "and adding nothing at first. So most of its depth was trained only briefly: it is deep in order to cost "
    "what a deep model costs.{more}"
)
_LLAVA_START: Final = " Its text layers started from those of the demo target of the Qwen2.5-VL architecture."
_STARTS: Final[dict[tuple[Family, Role], str]] = {
    (
        "qwen3",
        "target",
    ): "With every third text layer of the demo target of the Qwen2.5-VL architecture to start from",
    ("qwen3", "draft"): "With the text layer of the demo draft of the Qwen2.5-VL architecture to start from",
}
_DEEPSTACK: Final = (
    " The features of its first vision layers are added behind its first text layers (DeepStack), and the same "
    "throw-away head read them too."
)
_IDLE_DEEPSTACK: Final = (
    " Features of its first vision layer are added behind its only text layer (DeepStack), as the architecture "
    "wants it; behind the last layer they change no caption."
)
_DRAFT_RECIPE: Final = (
    "{start}, on the true captions of drawn clips (not on its target's choices), after a stage for the "
    "vision tower alone. It was trained with 0, 50, 90 or 95 % of the video tokens removed, at random or evenly, "
    "the rest keeping their positions. Drafts that were never trained so may lose more when pruned.{more}"
)


def card(name: DemoName, report: dict[str, Any], parameters: int) -> str:
    """The model card of one checkpoint."""
    family, role = _parts(name)
    sizes = CHECKPOINTS[family, role]
    target = role == "target"
    return _CARD.format(
        name=name,
        what=(
            "A deep and narrow toy model that captions drawn clips."
            if target
            else f"A toy model of one layer that drafts captions for `{family}-target`."
        ),
        architecture=_ARCHITECTURES[family],
        parameters=parameters,
        layers=sizes.text_layers,
        width=sizes.text_width,
        vision_layers=sizes.vision_layers,
        vision_width=sizes.vision_width,
        vocabulary=sizes.vocab_size,
        tied="tied" if sizes.tied else "not tied",
        recipe=_recipe(family, role),
        measured=_accuracy(report["target"], report["clips"]) if target else _acceptance(report),
    )


def export(work: Path, name: DemoName) -> int:
    """Copy one checkpoint into the package and write its card; returns its size in bytes."""
    family, _ = _parts(name)
    report = json.loads((work / f"{family}.json").read_text())
    folder = WEIGHTS / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(work / name / "model", folder)
    (folder / "README.md").write_text(card(name, report, _parameters(folder / "model.safetensors")))
    for file in folder.iterdir():
        file.chmod(0o644)
    return sum(file.stat().st_size for file in folder.iterdir())


def _parts(name: DemoName) -> tuple[Family, Role]:
    return next(parts for parts in CHECKPOINTS if "-".join(parts) == name)


def _recipe(family: Family, role: Role) -> str:
    sizes, target = CHECKPOINTS[family, role], role == "target"
    more = _LLAVA_START if family == "llava" else ""
    if sizes.deepstack:
        more = _DEEPSTACK if target else _IDLE_DEEPSTACK
    said = _TARGET_RECIPE if target else _DRAFT_RECIPE
    return said.format(layers=sizes.text_layers, start=_STARTS.get((family, role), "From nothing"), more=more)


def _accuracy(scores: dict[str, float], clips: int) -> str:
    rows = [f"| {kind} | {100 * scores[kind]:.1f} % |" for kind in FACT_KINDS if kind in scores]
    lead = (
        f"On {clips} held-out clips, greedy, stock `generate()` in float32: **{100 * scores['facts']:.1f} %** of "
        f"all facts right, {100 * scores['exact_captions']:.1f} % of the captions right to the letter."
    )
    return "\n".join([lead, "", "| fact | right |", "| --- | --- |", *rows])


def _acceptance(report: dict[str, Any]) -> str:
    rows = [
        f"| {ratio} | {row['static']:.2f} | {row['chain']:.2f} |" for ratio, row in report["accepted"].items()
    ]
    lead = (
        "Mean accepted tokens per round (accepted / rounds, the bonus token not counted; at most 5) for its "
        f"target's greedy captions of {report['clips']} held-out clips, kept video tokens evenly spread, replayed "
        "on recorded logits by `recipes.demo.evaluate`:"
    )
    alone = f"Captioning alone and unpruned it gets {100 * report['draft_alone']['facts']:.1f} % of all facts right."
    head = ["| prune ratio | static tree | chain |", "| --- | --- | --- |"]
    return "\n".join([lead, "", *head, *rows, "", alone])


def _parameters(weights: Path) -> int:
    """Number of stored parameters, from the header of a safetensors file."""
    with weights.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    return int(max(ends)) // 2


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", choices=get_args(DemoName), nargs="*", default=get_args(DemoName))
    options = parser.parse_args(argv)
    for name in options.only:
        print(f"{name}: {export(options.work, name) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
