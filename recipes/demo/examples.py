"""Write the eight example clips as real video files: `python -m recipes.demo.examples examples/videos`.

They are held-out scenes, chosen by fixed rules from seeds that training never uses: h264 and vp9, one stored
on its side with a display matrix that turns it upright, one with an irregular frame rate. The pictures are
the same each time; the encoder may spend the odd byte differently. A README gives the true captions.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Final

import av
import numpy as np
from av.video.stream import VideoStream
from numpy.typing import NDArray

from recipes.demo.captions import caption_for
from recipes.demo.clips import CLIP_SECONDS, EXAMPLE_SEEDS, Scene, render, scene_for, seed_for

FPS: Final = 12
_TICKS_PER_SECOND: Final = 12_000
_CODECS: Final = {
    ".mp4": ("libx264", {"crf": "20", "preset": "slow", "threads": "1"}),
    ".webm": ("libvpx-vp9", {"crf": "28", "b": "0", "threads": "1", "row-mt": "0"}),
}


@dataclass(frozen=True)
class Example:
    """One file: its name, which scene it needs, how it is stored. Sizes are of the upright picture."""

    name: str
    wanted: Callable[[Scene], bool]
    height: int = 192
    width: int = 192
    rotated: bool = False
    irregular: bool = False


def _moves(*motions: str) -> Callable[[Scene], bool]:
    return lambda scene: not scene.meet and tuple(t.motion for t in scene.things) == motions


EXAMPLES: Final = (
    Example("one-drifts-left.mp4", _moves("left")),
    Example("one-grows.mp4", _moves("grows")),
    Example("two-meet.mp4", lambda scene: scene.meet),
    Example("one-vanishes-vp9.webm", _moves("vanishes")),
    Example("two-still-and-rising-vp9.webm", _moves("still", "up")),
    Example("two-grows-and-shrinks.mp4", _moves("grows", "shrinks")),
    Example("one-sinks-rotated.mp4", _moves("down"), height=196, width=140, rotated=True),
    Example("one-slides-right-variable-rate.mp4", _moves("right"), irregular=True),
)


def example_scenes() -> list[Scene]:
    """The scene of each example: the first unused seed of the example set that fits."""
    scenes: list[Scene] = []
    index = 0
    for example in EXAMPLES:
        while not example.wanted(scene := scene_for(seed_for("examples", index))):
            index += 1
        index += 1
        scenes.append(scene)
    assert index <= len(EXAMPLE_SEEDS)
    return scenes


def frame_times(irregular: bool) -> NDArray[np.float32]:
    """Times of the stored frames [F]; an irregular clip has gaps of one to three frames."""
    times = np.arange(0, CLIP_SECONDS, 1 / FPS)
    if irregular:
        rng = np.random.default_rng(12)
        gaps = rng.choice([0.04, 0.06, 0.08, 0.12, 0.2], len(times))
        times = np.concatenate([[0.0], np.cumsum(gaps)])
        times = times[times < CLIP_SECONDS - 0.05]
    return times.astype(np.float32)


def write_video(
    path: Path,
    frames: NDArray[np.uint8],
    times_s: NDArray[np.float32],
    rotated: bool = False,
    **encoder: str,
) -> None:
    """Encode frames [F, height, width, 3] shown at the given times; `rotated` stores them on their side.

    The suffix of `path` chooses the encoder, whose options `encoder` replaces or adds to.
    """
    codec, options = _CODECS[path.suffix]
    stored = np.rot90(frames, 1, axes=(1, 2)) if rotated else frames
    faststart = {"movflags": "+faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options={"fflags": "+bitexact", **faststart}) as container:
        stream = container.add_stream(codec, rate=FPS, options=options | encoder)
        assert isinstance(stream, VideoStream)
        stream.height, stream.width, stream.pix_fmt = stored.shape[1], stored.shape[2], "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, _TICKS_PER_SECOND)
        stream.codec_context.flags |= 1 << 23  # AV_CODEC_FLAG_BITEXACT: no encoder version in the file
        if rotated:
            stream.set_display_rotation(-90)
        for picture, time_s in zip(stored, times_s, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts = round(float(time_s) * _TICKS_PER_SECOND)
            frame.time_base = Fraction(1, _TICKS_PER_SECOND)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_examples(folder: Path) -> list[Path]:
    """Write all example files and the README with their true captions."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        "# Example clips",
        "",
        "Eight clips of four seconds that the demo models have not been trained on, drawn and encoded by",
        "`python -m recipes.demo.examples examples/videos`. The true caption of each:",
        "",
    ]
    paths = []
    for example, scene in zip(EXAMPLES, example_scenes(), strict=True):
        times = frame_times(example.irregular)
        path = folder / example.name
        write_video(path, render(scene, times, example.height, example.width), times, example.rotated)
        lines += [f"**{example.name}**{_note(example)}: {caption_for(scene)}", ""]
        paths.append(path)
    (folder / "README.md").write_text("\n".join(lines))
    return paths


def _note(example: Example) -> str:
    if example.rotated:
        return " (stored on its side; a display matrix turns it upright)"
    return " (frames at irregular times)" if example.irregular else ""


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for path in write_examples(parser.parse_args(argv).folder):
        print(f"{path}  {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
