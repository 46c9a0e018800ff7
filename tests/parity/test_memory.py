"""A long video: memory follows the prompt's length, and nothing of size [tokens x tokens] is ever built."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Runs in a process of its own, whose peak is then this caption's.
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

family, frames = sys.argv[1], int(sys.argv[2])
captioner = tiny_captioner(family, Size(), Size(layers=1, seed=2))
video = captioner.prepare(random_frames(1, frames, 64, 64), "Describe it.")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with Largest():
    caption = captioner.caption(video, max_new_tokens=6)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
slots = captioner.target.new_cache(video.inputs.prompt_tokens).size_bytes
print(video.inputs.video_tokens, len(caption.token_ids), before * 1024, peak * 1024, Largest.size, slots)
"""


@pytest.mark.parametrize(("family", "frames"), [("qwen", 1112), ("llava", 1250)])
def test_twenty_thousand_video_tokens(family: str, frames: int) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _PROGRAM, family, str(frames)], capture_output=True, text=True, check=True
    )
    tokens, written, _, peak, largest, slots = map(int, run.stdout.split())
    assert tokens >= 20_000
    assert written == 6
    assert peak < 2 * 1000**3
    # A bool mask of [tokens x tokens] alone would take 400 MB; the pixels and the slabs take a few tens.
    assert largest < 150 * 1000**2
    assert slots < 20 * 1000**2
