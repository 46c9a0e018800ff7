"""Caption all videos of a folder, many in flight; each result is printed as it comes.

python examples/caption_folder.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

import specvlm

DEFAULT_FOLDER = Path(__file__).parent / "videos"
VIDEOS = {".mp4", ".mkv", ".webm", ".mov", ".avi"}


def main(folder: Path) -> None:
    """Caption what has a video's extension; a file that is no video gets a line that says why."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in VIDEOS)
    captioner = specvlm.load("demo")
    prompt = "Describe the video in detail."
    for done in captioner.caption_many(paths, prompt, batch_size=None, max_new_tokens=256):
        name = paths[done.index].name
        if done.caption is None:
            print(f"{name}: no caption: {done.error}", flush=True)
        else:
            print(f"{name}: {done.caption.text}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_FOLDER)
