"""A small video, written here and read back by each reader in a killable process, frame by frame."""

from __future__ import annotations

import importlib.util
import select
import tempfile
import time
from importlib import metadata
from pathlib import Path

from specvlm.config import BackendName, FrameSettings
from specvlm_cli.doctor.checks import CheckVerdict, fail, ok, warn

_FRAMES, _RATE, _STEP = 24, 12, 9  # each frame is brighter than the one before by _STEP
_WIDTH, _HEIGHT, _CHOSEN = 128, 96, 8
_LIMIT_S = 20.0


def pyav() -> CheckVerdict:
    """Read with PyAV, the default reader."""
    version = metadata.version("av")
    return _read("pyav", f"PyAV {version}", "pip install --force-reinstall av: without it nothing is read")


def decord() -> CheckVerdict:
    """Read with decord, where it is there."""
    if importlib.util.find_spec("decord") is None:
        return warn(
            "not installed; PyAV, the default, reads everything",
            "pip install decord (Linux on x86-64 only), or ignore this",
        )
    fix = "pip install --force-reinstall decord==0.6.0, or use --video-backend pyav"
    return _read("decord", f"decord {metadata.version('decord')}", fix)


def _read(backend: BackendName, name: str, fix: str) -> CheckVerdict:
    from specvlm_cli.readers import DecodingPool, Limits, ReadJob, ReadVideo

    with tempfile.TemporaryDirectory(prefix="specvlm-doctor-") as folder:
        path = Path(folder) / "clip.mp4"
        write_clip(path)
        began = time.monotonic()
        settings = FrameSettings(num_frames=_CHOSEN, backend=backend)
        with DecodingPool(1, Limits(timeout_s=_LIMIT_S)) as pool:
            pool.submit(ReadJob(0, bytes(path), settings, 1))
            while not (outcomes := pool.collect()):
                select.select(pool.descriptors(), (), (), pool.next_deadline_s())
            took_s = time.monotonic() - began
            outcome = outcomes[0]
            if not isinstance(outcome, ReadVideo):
                return fail(f"{name}: {outcome.error} ({outcome.error_type})", fix)
            frames = outcome.frames()
            outcome.close()
    shades = frames.pixels.mean(axis=(1, 2, 3))
    wrong = [
        abs(shade - _STEP * time_s * _RATE) > _STEP / 2
        for shade, time_s in zip(shades, frames.times_s, strict=True)
    ]
    if any(wrong):
        return fail(f"{name}: {sum(wrong)} of {len(wrong)} frames are not those that were asked for", fix)
    return ok(f"{name} read {len(wrong)} frames in a child process, in {took_s:.1f} s with its start")


def write_clip(path: Path) -> None:
    """Write two seconds of grey that becomes lighter."""
    import av
    import numpy as np

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=_RATE)  # decord takes nothing else
        stream.width, stream.height, stream.pix_fmt = _WIDTH, _HEIGHT, "yuv420p"
        for number in range(_FRAMES):
            picture = np.full((_HEIGHT, _WIDTH, 3), number * _STEP, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
