"""A long video: memory follows the prompt's length, and nothing of size [tokens x tokens] is ever built."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Runs in a process of its own, whose peak is then that of these captions.
_PROGRAM = """
import resource, sys
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tests.tiny import Size, random_frames, tiny_captioner

class Largest(TorchDispatchMode):
    size = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, torch.Tensor):
                Largest.size = max(Largest.size, one.untyped_storage().nbytes())
        return out

for word in sys.argv[1:]:
    family, frames = word.split(":")
    captioner = tiny_captioner(family, Size(), Size(layers=1, seed=2))
    video = captioner.prepare(random_frames(1, int(frames), 64, 64), "Describe it.")
    Largest.size = 0
    with Largest():
        caption = captioner.caption(video, max_new_tokens=6)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    slots = captioner.target.new_cache(video.inputs.prompt_tokens).size_bytes
    print(video.inputs.video_tokens, len(caption.token_ids), peak * 1024, Largest.size, slots)
"""


@pytest.mark.parametrize(
    ("tokens", "frames"), [(10_000, (556, 625)), pytest.param(20_000, (1112, 1250), marks=pytest.mark.slow)]
)
def test_many_video_tokens(tokens: int, frames: tuple[int, int]) -> None:
    words = [f"{family}:{count}" for family, count in zip(("qwen", "llava"), frames, strict=True)]
    run = subprocess.run([sys.executable, "-c", _PROGRAM, *words], capture_output=True, text=True, check=True)
    lines = [map(int, line.split()) for line in run.stdout.splitlines()]
    assert len(lines) == 2
    for seen, written, peak, largest, slots in lines:
        assert seen >= tokens
        assert written == 6
        assert peak < 2 * 1000**3
        # A bool mask of [tokens x tokens] alone would take 100 MB, or 400; the pixels take more than half of this.
        assert largest < 7500 * tokens < tokens**2
        assert slots < 1000 * tokens
