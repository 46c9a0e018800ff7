"""Caption one video from Python, with the draft and plainly, and see that the tokens are the same.

python examples/caption_one.py [VIDEO]
"""

from __future__ import annotations

import sys
from pathlib import Path

import specvlm

DEFAULT_VIDEO = min((Path(__file__).parent / "videos").glob("*.mp4"))


def main(video: Path) -> None:
    """Read the video once, and caption it twice."""
    captioner = specvlm.load("demo")
    prepared = captioner.prepare(video, "Describe the video in detail.")
    fast = captioner.caption(prepared, max_new_tokens=256)
    plain = captioner.caption(prepared, speculate=False, max_new_tokens=256)

    print(fast.text)
    print(f"same tokens as plain decoding: {fast.token_ids == plain.token_ids}")
    print(
        f"accepted tokens per round: {fast.stats.mean_accepted_tokens:.2f} in {fast.stats.num_drafts} rounds"
    )
    print(f"decoding: {plain.stats.decode_s:.2f} s plain, {fast.stats.decode_s:.2f} s with the draft")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_VIDEO)
