"""One caption with its statistics as one flat row: the columns of `captions/`, by name. Knows no Parquet.

The columns and their types are declared in `parts.py`; a test holds the two together.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from specvlm.packaged import local_name
from specvlm.records import Caption, CaptionStats, VideoSource
from specvlm_cli.caption.baseline import Comparison
from specvlm_cli.console.safe_text import path_text, storable
from specvlm_cli.run.ledger import Claim, Row
from specvlm_cli.workers.messages import VideoCaptions

_COPIED = (
    "method",
    "num_frames",
    "video_tokens",
    "video_tokens_kept",
    "compressor",
    "compression_ratio",
    "prompt_tokens",
    "completion_tokens",
    "num_drafts",
    "num_draft_tokens",
    "num_accepted_tokens",
    "mean_accepted_tokens",
    "mean_acceptance_length",
    "video_decode_s",
    "preprocess_s",
    "vision_s",
    "target_prefill_s",
    "draft_prefill_s",
    "decode_s",
    "total_s",
    "tokens_per_s",
    "mean_batch_size",
    "settled_tokens",
    "smallest_margin",
    "peak_memory_bytes",
    "device",
)


BEYOND_CONTEXT = "beyond_context"  # flag of a row with more tokens than the target was made for

DEMO_MODEL = "demo_model"  # flag of a row whose target describes drawn shapes only

_MEDIA = {  # column -> what it is of the file's own facts
    "duration_s": "duration_s",
    "fps": "fps",
    "width": "width",
    "height": "height",
    "video_backend": "backend",
}


@dataclass(frozen=True, slots=True)
class Provenance:
    """What is the same in every row of one start."""

    target_model: str
    target_revision: str | None
    draft_model: str | None
    config_hash: str
    specvlm_version: str
    run_id: str


def caption_row(
    claim: Claim,
    index: int,
    prompt: str,
    caption: Caption,
    comparison: Comparison | None,
    made: VideoCaptions,
    provenance: Provenance,
) -> Row:
    """Return the row of one caption: that for prompt number `index` of a video."""
    target = provenance.target_model
    return {
        "id": claim.item.id,
        "path": path_text(claim.item.path),
        "input_path": None if claim.item.input_path is None else path_text(claim.item.input_path),
        "start": claim.item.start_s,
        "end": claim.item.end_s,
        "prompt_index": index,
        "caption": storable(caption.text),
        "finish_reason": caption.finish_reason,
        **asdict(provenance),
        "prompt": prompt,
        "prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest(),
        "created_at": datetime.now(UTC).isoformat(timespec="microseconds"),
        **_media(caption.source),
        "flags": [
            *(caption.source.flags if caption.source else ()),
            *made.flags,
            *([BEYOND_CONTEXT] if caption.stats.beyond_context else ()),
            *([DEMO_MODEL] if local_name(target) != target else ()),
        ],
        "frame_times_s": list(made.times_s),
        **_statistics(caption.stats),
        **_speed(comparison),
        "attempts": claim.attempts,
        **(json.loads(claim.item.kept) if claim.item.kept else {}),
    }


def _media(source: VideoSource | None) -> Row:
    return {column: None if source is None else getattr(source, name) for column, name in _MEDIA.items()}


def _statistics(stats: CaptionStats) -> Row:
    return {name: getattr(stats, name) for name in _COPIED} | {
        "acceptance_histogram": list(stats.acceptance_histogram),
        "estimated_token_s": stats.plain_token_s,
    }


def _speed(comparison: Comparison | None) -> Row:
    if comparison is None:
        return dict.fromkeys(Comparison.__dataclass_fields__)
    return asdict(comparison)
