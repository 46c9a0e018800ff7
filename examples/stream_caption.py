"""Show a caption as it is written, several tokens at a time.

python examples/stream_caption.py [VIDEO]
"""

from __future__ import annotations

import sys
from pathlib import Path

import specvlm

DEFAULT_VIDEO = min((Path(__file__).parent / "videos").glob("*.mp4"))


def main(video: Path) -> None:
    """Print pieces as rounds end."""
    captioner = specvlm.load("demo")
    for piece in captioner.stream(video, "Describe the video in detail."):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_VIDEO)
