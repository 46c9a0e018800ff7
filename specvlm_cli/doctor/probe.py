"""What is asked of torch, in a process of its own: devices, a checkpoint, a tiny generation. One JSON object a line.

    python -m specvlm_cli.doctor.probe PRESET [TARGET [DRAFT]]

A driver that hangs or crashes takes this process with it and not the one that reports it (`models.py`).
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from typing import TYPE_CHECKING, Any

from specvlm_cli.process import watch_parent

if TYPE_CHECKING:
    from collections.abc import Callable

    from specvlm.records import Frames

TOKENS, _FIRST_TOKENS = 24, 4
_FRAMES, _SIDE = 8, 96


def devices() -> dict[str, Any]:
    """Return what torch was built for, and each accelerator that it can use."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = (
            [_cuda(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
        )
    if torch.backends.mps.is_available():
        found.append({"name": "mps", "bf16": True})
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "devices": found,
        "threads": torch.get_num_threads(),
        "said": [" ".join(str(one.message).split()) for one in caught],
    }


def _cuda(index: int) -> dict[str, Any]:
    """Return one device, having calculated on it; where that fails, why."""
    import torch

    name = f"cuda:{index} {torch.cuda.get_device_name(index)}"
    try:
        with torch.cuda.device(index):
            assert torch.ones(8, device=f"cuda:{index}").sum().item() == 8.0
            free, total = torch.cuda.mem_get_info(index)
            return {"name": name, "free": free, "total": total, "bf16": torch.cuda.is_bf16_supported()}
    except (RuntimeError, AssertionError) as error:
        return {"name": name, "error": " ".join(str(error).split())[:300]}


def generation(preset: str) -> dict[str, Any]:
    """Caption a few drawn frames, plainly and with the draft; return tokens and times of both."""
    import specvlm

    began = time.perf_counter()
    captioner = specvlm.load(preset, local_files_only=True)
    loaded_s = time.perf_counter() - began
    prepared = captioner.prepare(drawn(), "Describe the video in detail.")
    for speculate in (False, True):  # first use costs more
        captioner.caption(prepared, speculate=speculate, max_new_tokens=_FIRST_TOKENS)
    plain, ours = (
        captioner.caption(prepared, speculate=speculate, max_new_tokens=TOKENS) for speculate in (False, True)
    )
    return {
        "device": captioner.info.device,
        "loaded_s": loaded_s,
        "tokens": plain.stats.completion_tokens,
        "same": plain.token_ids == ours.token_ids,
        "plain_s": plain.stats.decode_s,
        "ours_s": ours.stats.decode_s,
        "accepted": ours.stats.mean_accepted_tokens,
    }


def checkpoint(target: str, draft: str | None = None) -> dict[str, Any]:
    """Load a target and its draft without their weights, and prepare a clip; return what they are, or why it fails."""
    import specvlm

    captioner = specvlm.load(target, draft=draft or "none", device_map="meta", local_files_only=True)
    inputs = captioner.prepare(drawn(), "Describe the video in detail.").inputs
    model = captioner.target.model
    return {
        "family": captioner.info.family,
        "parameters": sum(one.numel() for one in model.parameters()),
        "context": captioner.target.context_tokens,
        "prompt": inputs.prompt_tokens,
        "video": inputs.video_tokens,
        "frames": _FRAMES,
        "draft": captioner.info.draft,
        "warnings": list(captioner.info.warnings),
    }


def drawn() -> Frames:
    """Return a red square that moves to the right."""
    import numpy as np

    from specvlm.records import Frames

    pixels = np.full((_FRAMES, _SIDE, _SIDE, 3), 235, np.uint8)
    for index in range(_FRAMES):
        left = 8 + index * 7
        pixels[index, 32:56, left : left + 24] = (220, 40, 40)
    return Frames(pixels, np.arange(_FRAMES) / 2.0)


def main(preset: str, *checkpoints: str) -> int:
    """Say everything, a line each, on what was stdout; nothing else may write there."""
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    asked: list[Callable[[], dict[str, Any]]] = [devices, lambda: generation(preset)]
    if checkpoints:
        asked.insert(1, lambda: checkpoint(*checkpoints))
    for what in asked:
        try:
            answer = what()
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]}
        print(json.dumps(answer), file=said, flush=True)
    return 0


if __name__ == "__main__":
    watch_parent(os.getppid())
    sys.exit(main(*sys.argv[1:]))
