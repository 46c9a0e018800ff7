"""What benchmarks/gpu.py found, as Markdown for docs/benchmarks.md. Plain data in, text out; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def _cell(value: Any, form: str = "") -> str:
    return "" if value is None else f"{value:{form}}"


def _ms(value: float | None) -> str:
    return _cell(None if value is None else value * 1e3, ".2f")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines] + [""]


def markdown(found: dict[str, Any]) -> str:
    """The tables for docs/benchmarks.md."""
    lines = ["# GPU benchmarks", ""]
    lines += [", ".join(f"{key} {value}" for key, value in found["conditions"].items()) + ".", ""]
    if found["bandwidth"]:
        rate = found["bandwidth"]
        lines += [
            f"Copy {rate['bytes_per_s'] / 1e12:.3f} TB/s, product {rate['flops_per_s'] / 1e12:.1f} TFLOP/s.",
            "",
        ]
    lines += _parity_lines(found["parity"]) + _shape_lines(found["shapes"])
    lines += _exactness_lines(found["exactness"]) + _batch_lines(found["batches"])
    lines += _choice_lines(found["choices"]) + _round_lines(found["rounds"])
    lines += _head_lines(found["heads"])
    for one in found["profiles"]:
        lines += _profile_lines(one)
    lines += [f"- left out: {one['what']}: {one['why']}" for one in found["skipped"]]
    return "\n".join(lines).rstrip() + "\n"


def _parity_lines(parity: dict[str, Any]) -> list[str]:
    if not parity.get("comparisons"):
        return []
    lines = [
        "## Parity with stock generate()",
        "",
        (
            f"{parity['exact']} of {parity['comparisons']} captions equal stock's, token for token "
            f"({parity['exact_share']:.2%}); {parity['beyond_tolerance']} of the others part where stock's two best "
            f"scores are more than {parity['tolerance']:g} of the best apart."
        ),
        "",
    ]
    rows = [[o["model"], o["way"], f"{o['exact']}/{o['captions']}"] for o in parity["captions"]]
    lines += _table(["model", "way", "equal"], rows)
    rows = [
        [
            o["model"],
            o["way"],
            str(o["clip"]),
            str(o["first_index"]),
            f"{o['margin']:.4f}",
            f"{o['best']:.2f}",
        ]
        for o in parity["differences"]
    ]
    return lines + (_table(["model", "way", "clip", "first", "margin", "best"], rows) if rows else [])


def _exactness_lines(exactness: Sequence[dict[str, Any]]) -> list[str]:
    rows = [
        [
            one["model"],
            one["dtype"],
            one["attention"],
            one["way"],
            str(one["batch_size"]),
            "yes" if one["exact"] else "no",
            f"{one['equal']}/{one['captions']}",
            f"{one['settled_share']:.2%}",
            _cell(one["bound"], ".4f"),
            _cell(one["smallest_margin"], ".4f"),
            ", ".join(f"{made_by}: {count}" for made_by, count in one["first_differences"].items()),
        ]
        for one in exactness
    ]
    head = (
        "model|dtype|attention|way|batch|exact|equal|settled|bound|smallest margin|first differences by rows"
    )
    title = "## Exactness in half precision: captions equal to stock's of each video alone"
    return [title, "", *_table(head.split("|"), rows)] if rows else []


def _shape_lines(shapes: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["## Pairs of published shapes (modelled)", ""] if shapes else []
    for one in shapes:
        lines += [
            (
                f"{one['target']} + {one['draft']}, {one['frames']} frames, {one['prompt_tokens']} prompt tokens "
                f"({one['label']})."
            ),
            "",
        ]
        rows = [
            [
                row["error"] or row["configuration"],
                _ms(row["token_s"]),
                _cell(row["decode_speedup"], ".2f"),
                _cell(row["e2e_speedup"], ".2f"),
                _cell(row["predicted"], ".2f"),
                _cell(row["accepted"], ".2f"),
                _ms(row["draft_round_s"]),
                _ms(row["verify_round_s"]),
                _cell(row["roofline"], ".0%"),
                _cell(row["verify_roofline"], ".0%"),
                _cell(row["draft_roofline"], ".0%"),
            ]
            for row in one["rows"]
        ]
        head = "modelled|ms/token|decode x plain|end to end x plain|predicted|accepted|draft ms|verify ms"
        lines += _table([*head.split("|"), "roofline", "of verify", "of draft"], rows)
    return lines


def _batch_lines(batches: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    if batches["parity"]:
        rows = [
            [o["model"], str(o["batch_size"]), o["way"], f"{o['exact']}/{o['captions']}"]
            for o in batches["parity"]
        ]
        lines += ["## Batches: captions equal to stock's of each video alone", ""]
        lines += _table(["model", "batch", "way", "equal"], rows)
    if batches["speed"]:
        rows = [
            [
                f"{o['target']} + {o['draft']}, {o['frames']} frames",
                str(o["batch_size"]),
                o["way"],
                _cell(o.get("videos_per_hour"), ",.0f"),
                _cell(o.get("tokens_per_s"), ",.0f"),
                _cell(o.get("accepted"), ".2f"),
                _cell(o["over_stock"], ".2f"),
                _cell(o["over_plain"], ".2f"),
                o["error"] or "",
            ]
            for o in batches["speed"]
        ]
        head = "modelled|batch|way|videos/h|tokens/s|accepted|x stock|x plain|error"
        lines += ["## Batches: from prepared videos to tokens", "", *_table(head.split("|"), rows)]
    if batches["attention"]:
        rows = [
            [
                f"{o['rows']} videos of different lengths, {o['tree']}",
                o["attention"],
                _ms(o.get("round_s")),
                _ms(o.get("draft_s")),
                _ms(o.get("verify_s")),
                o["error"] or "",
            ]
            for o in batches["attention"]
        ]
        head = "modelled|attention|round ms|draft ms|verify ms|error"
        lines += ["## Batches: how rounds attend", "", *_table(head.split("|"), rows)]
    return lines


def _choice_lines(choices: Sequence[dict[str, Any]]) -> list[str]:
    rows = [
        [
            f"{one['target']} + {one['draft']}, {one['frames']} frames, {one['tree']}",
            f"{one['group']}: {one['choice']}",
            _ms(one["round_s"]),
            _ms(one["draft_s"]),
            _ms(one["verify_s"]),
            one["error"] or "",
        ]
        for one in choices
    ]
    head = ["modelled", "choice", "round ms", "draft ms", "verify ms", "error"]
    return ["## Choices on the hot path", "", *_table(head, rows)] if rows else []


def _round_lines(rounds: Sequence[dict[str, Any]]) -> list[str]:
    rows = [
        [
            f"{one['target']} + {one['draft']}, {one['frames']} frames, {one['tree']}",
            _ms(one["round_s"]),
            _ms(one["device_s"]),
            _ms(one["host_s"]),
            f"{one['host_over_device']:.1%}",
        ]
        for one in rounds
    ]
    head = ["modelled", "round ms", "device ms", "host ms", "host / device"]
    return ["## Host and device", "", *_table(head, rows)] if rows else []


def _head_lines(heads: Sequence[dict[str, Any]]) -> list[str]:
    rows = [
        [
            f"{one['target']}, {one['frames']} frames",
            f"{one['compressor']}, {one['vocabulary']:,} tokens, {one['tree']} ({one['nodes']} nodes)",
            _ms(one["prefill_s"]),
            _ms(one["step_s"]),
            _ms(one["draft_s"]),
            _ms(one["verify_s"]),
            _ms(one["round_s"]),
            _ms(one["plain_s"]),
            _cell(one["accepted"], ".2f"),
            _cell(one["decode_speedup"], ".2f"),
        ]
        for one in heads
    ]
    head = "modelled|head|prefill ms|step ms|draft ms|verify ms|round ms|plain ms|accepted|decode x plain"
    return ["## Trained heads", "", *_table(head.split("|"), rows)] if rows else []


def _profile_lines(one: dict[str, Any]) -> list[str]:
    rows = [
        [f"`{top['name']}`", f"{top['calls']:.1f}", _ms(top["round_s"]), f"{top['share']:.1%}"]
        for top in one["top"]
    ]
    title = f"Profile: {one['target']} + {one['draft']}, {one['frames']} frames, {one['tree']} (modelled)"
    return [f"## {title}", "", *_table(["operation", "calls a round", "ms a round", "share"], rows)]
