"""A bench as one HTML file that needs nothing else: no network, no script, plots and pictures inside.

Text from outside (paths, errors, model names, the command) is escaped, and what could not be seen in it is shown.
The page forbids itself to load anything, so that a browser would refuse what slipped through. Importing this file
is cheap; matplotlib is loaded when a page is made.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from specvlm.bench.records import BASELINES, BenchReport, Speedup, Summary
from specvlm.bench.words import (
    Column,
    baseline_of,
    clips_words,
    frames_notes,
    frames_of,
    has_several_frames,
    limits,
    missing_words,
    ms,
    name_of,
    number,
    peak_words,
    rate,
    rate_columns,
    reference,
    rounds_columns,
    settled,
    speedup_cell,
    spread_columns,
    stopped_words,
)
from specvlm.words import amount, counted, percent

if TYPE_CHECKING:
    from specvlm.bench.plots import Plot

_MOST_CHARACTERS = 60  # of an error in a table
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


class PageSheet(NamedTuple):
    """A picture for the page, as `specvlm inspect` draws it."""

    title: str  # text from outside, e.g. the clip's name
    png: bytes


def write_page(report: BenchReport, path: Path, sheets: Sequence[PageSheet] = ()) -> None:
    """Write the page; what is at `path` is replaced.

    Args:
        report: What was measured.
        path: The file, usually `.html`.
        sheets: Pictures of what the draft was given.

    Raises:
        OSError: The file cannot be written.
    """
    path.write_text(page(report, sheets), encoding="utf-8")


def page(report: BenchReport, sheets: Sequence[PageSheet] = ()) -> str:
    """The page as text, without lone surrogates."""
    from specvlm.bench.plots import plots

    its = report.conditions
    title = f"{its.target}, {its.device}"
    parts = [
        _head(report),
        _conditions(report),
        _left_out(report),
        _figures(report, "throughput", "Throughput", rate_columns()) if report.is_batched else "",
        _section("results", "Results", _results(report)),
        _figures(report, "spread", "Speedups over turns, p10 to p90", spread_columns()),
        *map(_plot, plots(report)),
        _section("rounds", "Rounds", _rounds(report)) if any(s.num_drafts for s in report.summaries) else "",
        _section("limits", "Limits", _limits(report)),
        *(_sheet(number, sheet) for number, sheet in enumerate(sheets, 1)),
        _section("reading", "How to read it", _READING),
    ]
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>specvlm bench: {safe(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def safe(text: str) -> str:
    """Text from outside, escaped; white space folded, and what cannot be seen shown as U+FFFD."""
    folded = " ".join(text.split())
    return escape("".join(character if character.isprintable() else "\ufffd" for character in folded))


# --- parts of the page ---


def _head(report: BenchReport) -> str:
    its = report.conditions
    pair = safe(its.target) + (f" with {safe(its.draft)}" if its.draft else "")
    return (
        f'<header><h1>specvlm bench</h1><p class="pair">{pair}</p>'
        f"{_headline(report)}<p><code>{safe(its.command)}</code></p></header>"
    )


def _headline(report: BenchReport) -> str:
    """The fastest configuration from the file to the text, its numbers large."""
    base = baseline_of(report)
    if base is None:
        return ""
    ran = [(one, found) for one in report.summaries if (found := one.speedup(base)) is not None]
    best, found = max(ran, key=_throughput if report.is_batched else lambda pair: pair[1].e2e)
    accepted = best.mean_accepted_tokens
    figures = [
        (rate(best.videos_per_hour) if report.is_batched else "", "videos an hour"),
        (f"{found.e2e:.2f} ×", "end to end"),  # noqa: RUF001
        ("" if found.decode is None else f"{found.decode:.2f} ×", "decode"),  # noqa: RUF001
        ("" if accepted is None else f"{accepted:.2f}", "accepted tokens a round"),
        ("" if best.exact_match is None else percent(best.exact_match), "of captions the same"),
    ]
    shown = "".join(f"<li><b>{value}</b> {name}</li>" for value, name in figures if value)
    name = safe(name_of(best, has_several_frames(report.summaries)))
    words = f"Fastest end to end: <b>{name}</b>, against {base}."
    if report.is_batched:
        words = f"Most videos an hour: <b>{name}</b>, against {base} at the same batch size."
    return f'<p>{words}</p><ul class="figures">{shown}</ul>'


def _throughput(pair: tuple[Summary, Speedup]) -> float:
    return pair[0].videos_per_hour or 0.0


def _conditions(report: BenchReport) -> str:
    its = report.conditions
    versions = {
        "specvlm": its.specvlm_version,
        "torch": its.torch_version,
        "transformers": its.transformers_version,
        "Python": its.python_version,
    }
    rows = [
        ("target", its.target),
        ("draft", its.draft or "none"),
        ("family, dtype", f"{its.family}, {its.dtype}"),
        ("device", its.device),
        ("machine", ", ".join(word for word in (its.machine, its.processor) if word)),
        ("cores, threads", f"{counted(its.cores, 'core')}, {counted(its.threads, 'thread')}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("clips", clips_words(report)),
        ("prompt", its.prompt),
        ("captions", f"at most {counted(its.max_new_tokens, 'token')}"),
        ("turns", f"{its.repeat} timed, after one of warm-up"),
        ("frames", "; ".join(frames_notes(report))),
        ("peak memory", peak_words(report)),
        ("stopped", stopped_words(report).removeprefix("stopped early: ")),
        ("begun", its.started_at),
    ]
    shown = "".join(f"<div><dt>{name}</dt><dd>{safe(value)}</dd></div>" for name, value in rows if value)
    return f'<section id="conditions"><h2>Conditions</h2><dl>{shown}</dl></section>'


def _left_out(report: BenchReport) -> str:
    if not report.left_out:
        return ""
    lines = "".join(f"<li><b>{safe(one.video)}</b>: {safe(one.reason)}</li>" for one in report.left_out)
    return _section("left-out", "Left out", f"<ul>{lines}</ul>")


def _plot(plot: Plot) -> str:
    note = f"<p>{safe(plot.note)}</p>"
    title = safe(plot.title)
    drawing = plot.svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
    return _section(f"plot-{plot.name}", title, f'{note}<div class="scroll plot">{drawing}</div>')


def _sheet(number: int, sheet: PageSheet) -> str:
    data = base64.b64encode(sheet.png).decode("ascii")
    title = safe(sheet.title)
    picture = f'<img alt="Kept video tokens of {title}" src="data:image/png;base64,{data}">'
    note = "<p>What the target looked at, and what the draft was given. <code>specvlm inspect</code> draws it.</p>"
    return _section(f"sheet-{number}", title, f'{note}<div class="scroll sheet">{picture}</div>')


def _section(name: str, title: str, inner: str) -> str:
    return f'<section id="{name}"><h2>{title}</h2>{inner}</section>'


# --- tables ---


def _results(report: BenchReport) -> str:
    bases = [base for base in BASELINES if any(one.speedup(base) for one in report.summaries)]
    columns = [
        *(Column(f"decode × {base}", speedup_cell(base, "decode")) for base in bases),  # noqa: RUF001
        *(Column(f"end to end × {base}", speedup_cell(base, "e2e")) for base in bases),  # noqa: RUF001
        Column("accepted", lambda one: number(one.mean_accepted_tokens)),
        Column(f"same as {reference(report)}", lambda one: percent(one.exact_match)),
        Column("settled", settled),
        Column("ms/token", lambda one: ms(one.token_s)),
        Column("ms/video", lambda one: ms(one.total_s / one.videos, 1)),
        Column("video tokens", lambda one: f"{one.video_tokens:.0f}"),
        Column("draft sees", lambda one: f"{one.video_tokens_kept:.0f}" if one.video_tokens_kept else ""),
        Column("compressor", lambda one: ", ".join(one.compressors)),
    ]
    if report.conditions.peak_memory_of == "device":
        columns.append(Column("peak memory", lambda one: amount(one.peak_memory_bytes)))
    return _table(report, report.summaries, columns)


def _figures(report: BenchReport, name: str, title: str, columns: Sequence[Column]) -> str:
    """A section with a table of these columns; none where all are empty."""
    if not any(column.cell(one) for one in report.summaries for column in columns):
        return ""
    shown = [one._replace(name=one.name.replace("\n", " ").replace(" x ", " × ")) for one in columns]  # noqa: RUF001
    return _section(name, title, _table(report, report.summaries, shown))


def _rounds(report: BenchReport) -> str:
    columns = [
        one._replace(name=one.name.replace("/\n", " / ").replace("\nms", ", ms").replace("\n", " "))
        for one in rounds_columns()
    ]
    shown = [one for one in report.summaries if one.num_drafts]
    return _table(report, shown, columns)


def _table(report: BenchReport, summaries: Iterable[Summary], columns: Sequence[Column]) -> str:
    """A table that scrolls by itself where it is too wide; columns without a word are left out."""
    shown, several = list(summaries), has_several_frames(report.summaries)
    cells = {column.name: [column.cell(one) if one.videos else "" for one in shown] for column in columns}
    names = [name for name, column in cells.items() if any(column)]
    listed = {column.name for column in columns if column.is_listed}
    lines = []
    for place, one in enumerate(shown):
        first = f'<th scope="row">{safe(one.configuration.label)}</th>'
        frames = f"<td>{frames_of(one)}</td>" if several else ""
        frames += f"<td>{one.configuration.batch_size}</td>" if report.is_batched else ""
        if one.error is not None:
            words = missing_words(one, _short(one.error))
            kind = words.partition(":")[0].replace(" ", "-")
            rest = f'<td class="{kind}" colspan="{max(len(names), 1)}">{safe(words)}</td>'
        else:
            rest = "".join(_cell("td", cells[name][place], name in listed) for name in names)
        begins = place > 0 and _kin(one) != _kin(shown[place - 1])
        lines.append(f"<tr{' class=begins' if begins else ''}>{first}{frames}{rest}</tr>")
    head = ["method", *(["frames"] if several else []), *(["batch"] if report.is_batched else []), *names]
    top = "".join(_cell('th scope="col"', name, name in listed) for name in head)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _kin(one: Summary) -> tuple[int | None, int]:
    """What is the same in rows that are compared."""
    return one.configuration.frames_asked, one.configuration.batch_size


def _cell(tag: str, text: str, is_listed: bool) -> str:
    """A cell; where its figures stand below those of another, a missing one is as wide as they are."""
    shown = text.replace("   -", 3 * "\u2007" + "-") if is_listed else safe(text)
    return f"<{tag}{' class=listed' if is_listed else ''}>{shown}</{tag.partition(' ')[0]}>"


def _short(error: str) -> str:
    """An error as it fits into a table; the page has all of it further down."""
    return error if len(error) <= _MOST_CHARACTERS else error[:_MOST_CHARACTERS].rstrip() + "…"


def _limits(report: BenchReport) -> str:
    lines = [f"<li><b>{safe(name)}</b>: {safe(said)}</li>" for name, said in limits(report)]
    return f"<ul>{''.join(lines)}</ul>" if lines else "<p>Nothing can be said: no captions were timed.</p>"


_READING = """<ul>
<li><b>Decode</b> is all after the first token; <b>end to end</b> is from opening the file to the text, which is
what a user waits for. Both are ratios of totals over the videos, of each video the turn whose total time is the
median, against the baseline on the same videos in the same process.</li>
<li><b>Accepted</b> are guesses that a round accepts, in the mean, without the token that the target adds
itself.</li>
<li><b>The same</b> is the share of captions equal to the reference's, token for token.</li>
<li><b>p10 to p90</b>: of a turn's ratio of totals, or of its videos an hour, a tenth of the turns stay below the
first and a tenth above the second.</li>
<li><b>Predicted</b>: (accepted + 1) × T_plain / (T_draft + T_verify), with a round's terms as measured here.</li>
</ul>"""  # noqa: RUF001

_STYLE = """
:root{--ink:#1b1f24;--faint:#5b6570;--paper:#fff;--panel:#f5f7f9;--rule:#d5dbe1;--link:#1c6fb5;--alarm:#b3261e}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ed;--faint:#9aa5b1;--paper:#14171b;--panel:#1c2127;
--rule:#343c45;--link:#6cb2ee;--alarm:#ff8a80}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{overflow-wrap:anywhere;max-width:1200px;margin:0 auto;padding:24px 20px 64px}
h1{font-size:1.05rem;margin:0;color:var(--faint);font-weight:600}
h2{font-size:1.2rem;margin:0 0 10px}
section{margin-top:40px}
p{margin:0 0 10px;max-width:75ch}
.pair{font-size:1.6rem;font-weight:700;line-height:1.25;max-width:none}
code{font:.9em ui-monospace,monospace;background:var(--panel);padding:2px 6px;border-radius:4px}
.figures{display:flex;flex-wrap:wrap;gap:12px 36px;list-style:none;padding:0;margin:8px 0 16px}
.figures li{color:var(--faint);font-size:.9rem}
.figures b{display:block;font-size:1.9rem;line-height:1.2;color:var(--ink);font-variant-numeric:tabular-nums}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:6px 32px;margin:0}
dl div{display:flex;gap:12px;border-bottom:1px solid var(--rule);padding:4px 0}
dt{flex:0 0 8.5em;color:var(--faint)}
dd{margin:0;min-width:0}
ul{padding-left:1.2em;margin:0}
.scroll{overflow-x:auto}
table{overflow-wrap:normal;border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums;min-width:100%}
th,td{padding:6px 10px;border-bottom:1px solid var(--rule);text-align:right;white-space:nowrap}
thead th{color:var(--faint);font-weight:600;vertical-align:bottom;white-space:normal;min-width:5.5em}
th:first-child{text-align:left;padding-left:0;position:sticky;left:0;background:var(--paper);font-weight:600}
tr.begins>*{border-top:2px solid var(--faint)}
table+*,.scroll+p{margin-top:10px}
.listed{text-align:left}
td.failed,td.not-run{text-align:left;color:var(--alarm);white-space:normal}
td.not-run{color:var(--faint)}
.plot svg{display:block;width:100%;min-width:640px;height:auto}
.sheet img{display:block;width:100%;min-width:640px;height:auto;border-radius:8px}
"""
