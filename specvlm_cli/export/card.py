"""The dataset card: what a README.md of the hub says at its top in YAML, and below it in words.

Everything in it comes from the rows and the run's settings, nothing from the moment. No licence is given: it is
that of the videos and of the target, which we do not know.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from specvlm_cli.console.safe_text import clean
from specvlm_cli.export.merge import CaptionPlace
from specvlm_cli.run.ledger_view import Row

_MOST = 10  # values of one kind that are named
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_MORE = ((10_000_000, "1M<n<10M"), (100_000_000, "10M<n<100M"), (1_000_000_000, "100M<n<1B"))
_NAMED = ("target_model", "draft_model", "prompt", "specvlm_version")


@dataclass
class Facts:
    """What the rows of an export have in common, gathered while they pass."""

    captions: int = 0
    values: dict[str, dict[str, None]] = field(default_factory=lambda: {name: {} for name in _NAMED})

    def watch(self, captions: Iterator[tuple[CaptionPlace, Row]]) -> Iterator[tuple[CaptionPlace, Row]]:
        """Pass captions on, and take note of them."""
        for place, row in captions:
            self.captions += 1
            for name, seen in self.values.items():
                if row.get(name) is not None and len(seen) <= _MOST:
                    seen[str(row[name])] = None
            yield place, row


@dataclass(frozen=True, slots=True)
class Config:
    """One table of the dataset, as `datasets.load_dataset` names it."""

    name: str
    paths: tuple[str, ...]
    is_empty: bool = False  # `load_dataset` refuses a table without a row, but where it streams


def card(
    title: str, configs: list[Config], facts: Facts, counts: dict[str, int], settings: dict[str, Any]
) -> str:
    """Return the card."""
    lines = ["---", *_yaml(configs, facts.captions), "---", "", f"# {title}", "", *_made(facts, counts)]
    for name, heading in (("prompt", "Prompts"),):
        lines += ["", f"## {heading}", "", *_block(facts.values[name])]
    if settings:
        text = json.dumps(settings, indent=2, sort_keys=True)
        lines += ["", "## Settings", "", *(f"    {clean(line)}" for line in text.split("\n"))]
    lines += ["", "## Reading it", "", *_reading(configs)]
    return "\n".join(lines) + "\n"


def _yaml(configs: list[Config], captions: int) -> Iterator[str]:
    size = next((name for most, name in (*_SIZES, *_MORE) if captions < most), "n>1T")
    yield from (
        "task_categories:",
        "- video-text-to-text",
        "tags:",
        "- video",
        "- video-captioning",
        "- specvlm",
    )
    yield from ("size_categories:", f"- {size}", "configs:")
    for config in configs:
        yield f"- config_name: {config.name}"
        yield from ("  data_files:", "  - split: train", "    path:")
        yield from (f"    - {json.dumps(path)}" for path in config.paths)


def _made(facts: Facts, counts: dict[str, int]) -> Iterator[str]:
    yield "Captions of videos, made with specvlm. A model wrote them and they were not checked; what a video shows or"
    yield "says may have steered it."
    yield ""
    for name, label in (("target_model", "target"), ("draft_model", "draft"), ("specvlm_version", "specvlm")):
        if names := _names(facts.values[name]):
            yield f"- {label}: {names}"
    yield from (f"- {label.replace('_', ' ')}: {number}" for label, number in counts.items())
    yield ""
    yield "The target chose every token. The draft only guessed, to save time; where captions were compared with"
    yield "plain decoding, `exact_match` says whether they agree."


def _names(values: dict[str, None]) -> str:
    shown = [f"`{clean(value).replace('`', chr(39))}`" for value in list(values)[:_MOST]]
    return ", ".join([*shown, "and more"] if len(values) > _MOST else shown)


def _block(values: dict[str, None]) -> Iterator[str]:
    """Yield each value as a block of code, in which nothing is markup."""
    for value in list(values)[:_MOST]:
        yield from (f"    {clean(line)}" for line in value.split("\n"))
        yield ""
    if len(values) > _MOST:
        yield "And more: see the column `prompt`."


def _reading(configs: list[Config]) -> Iterator[str]:
    yield "    from datasets import load_dataset"
    for config in configs:
        name = "" if config.name == "default" else f", {json.dumps(config.name)}"
        how = ", streaming=True" if config.is_empty else ""
        yield f'    {"captions" if not name else config.name} = load_dataset("PATH"{name}, split="train"{how})'
