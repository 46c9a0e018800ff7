"""The page of a bench as text: what stands in it, and what must not. How it looks is for tests/browser."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from specvlm.bench.grid import Grid
from specvlm.bench.page import PageSheet, page, safe, write_page
from specvlm.bench.plots import MOST_SERIES, STAGE_COLOURS, plots
from specvlm.bench.records import STAGES, BenchReport, Configuration, Summary
from specvlm.bench.words import STAGE_NAMES
from tests.bench_reports import BATCHED, FULL, HOSTILE, hostile, made

VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """Collects tags, attributes and the cells of tables, and refuses what is not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.rows: list[list[str]] = []
        self._cell: list[str] | None = None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self._cell = []

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attributes]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag in ("td", "th") and self._cell is not None:
            self.rows[-1].append("".join(self._cell))
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell.append(data)


REPORTS = {
    "quick": made(),
    "full": made(FULL),
    "hostile": hostile(),
    "batches": made(BATCHED),
    "no baseline": made(Grid(("sd", "specvlm"))),
    "nothing but the baseline": made(Grid(("stock",))),
    "all failed": replace(made(), summaries=(Summary(Configuration("stock"), error="out of memory"),)),
    "nothing": replace(made(), summaries=()),
}


@pytest.mark.parametrize("name", REPORTS)
def test_a_page_is_whole_and_refers_to_nothing_outside(name: str) -> None:
    text = page(REPORTS[name], [PageSheet("clip", b"png")])
    read = Reader(text)
    assert text.startswith("<!DOCTYPE html>")
    assert read.tags["main"] == read.tags["title"] == 1
    assert not set(read.tags) & {"script", "link", "iframe", "object", "embed", "form", "base"}
    for tag, attribute, value in read.attributes:
        assert not attribute.startswith("on")
        if attribute in ("src", "href", "xlink:href"):
            assert value.startswith(("#", "data:image/png;base64,")), (tag, value)
    assert not re.search(r"url\((?!#)|@import", text)
    ((_, _, policy),) = [one for one in read.attributes if one[2].startswith("default-src")]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    ids = Counter(value for _, attribute, value in read.attributes if attribute == "id")
    assert [one for one, count in ids.items() if count > 1] == []


@pytest.mark.parametrize("name", ["quick", "full"])
def test_the_table_has_every_configuration_with_its_figures(name: str) -> None:
    report = REPORTS[name]
    head, *rows = Reader(page(report)).rows[: len(report.summaries) + 1]
    assert len(rows) == len(report.summaries)
    assert ("frames" in head) == (name == "full")
    for row, one in zip(rows, report.summaries, strict=True):
        told = dict(zip(head, row, strict=True))
        assert told["method"] == one.configuration.label
        found = one.speedup("stock")
        assert told["decode × stock"] == ("1.00" if found is None else f"{found.decode:.2f}")  # noqa: RUF001
        assert told["end to end × stock"] == ("1.00" if found is None else f"{found.e2e:.2f}")  # noqa: RUF001
        accepted = one.mean_accepted_tokens
        assert told["accepted"] == ("" if accepted is None else f"{accepted:.2f}")
        assert told["same as stock"] == ("" if found is None else "100 %")
        assert told["ms/token"] == f"{1e3 * (one.token_s or 0.0):.2f}"
        if name == "full":
            assert told["frames"] == f"{(one.configuration.frames_asked or 0) - 0.5:.1f}", (
                "those that were read"
            )


def test_the_headline_is_the_fastest_end_to_end() -> None:
    text = page(made())
    assert re.search(r"Fastest end to end: <b>sd static</b>, against stock\..*?<b>1\.91 ", text)


def test_all_but_one_caption_the_same_is_not_all() -> None:
    summaries = [replace(one, exact_match=0.9999) if one.exact_match else one for one in made().summaries]
    cells = {cell for row in Reader(page(replace(made(), summaries=tuple(summaries)))).rows for cell in row}
    assert ">99.9 %" in cells
    assert "100 %" not in cells


def test_an_error_stands_in_its_row_and_the_others_go_on() -> None:
    failed = Summary(Configuration("assisted"), error="vocabularies differ: 640 & 624 <b>")
    summaries = [failed if one.configuration.method == "assisted" else one for one in made().summaries]
    text = page(replace(made(), summaries=tuple(summaries)))
    rows = Reader(text).rows
    assert ["assisted", "not run: vocabularies differ: 640 & 624 <b>"] in rows
    assert len(rows[1]) > 5
    assert "<b>assisted</b>: not run: vocabularies differ" in text


def test_a_long_error_is_short_in_the_table_and_whole_below() -> None:
    error = "out of memory: " + 20 * "a long story, "
    text = page(replace(made(), summaries=(Summary(Configuration("stock"), error=error),)))
    (_, row) = Reader(text).rows
    assert row[1].startswith("failed: out of memory: a long story, ")
    assert len(row[1]) < 80
    assert f"failed: {error.strip()}</li>" in text


def test_text_from_outside_is_escaped_and_seen() -> None:
    assert safe("<b>&\"'") == "&lt;b&gt;&amp;&quot;&#x27;"
    assert safe(" a\n\tb ") == "a b"
    assert safe("x\x1b[0m\u202e\ud800y") == "x\ufffd[0m\ufffd\ufffdy"


def test_the_file_is_utf8_whatever_stands_in_it(tmp_path: Path) -> None:
    sheet = PageSheet(HOSTILE, b"\x89PNG not really")
    write_page(hostile(), tmp_path / "page.html", [sheet])
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"data:image/png;base64,{base64.b64encode(sheet.png).decode()}" in text
    assert "<script" not in text


def test_the_same_report_gives_the_same_page() -> None:
    assert page(made()) == page(made())


@pytest.mark.parametrize(
    ("grid", "names"),
    [
        (Grid(), ["speedup", "stages", "depth"]),
        (Grid(prune_ratios=(0.5, 0.9)), ["speedup", "ratio", "stages", "depth"]),
        (Grid(num_frames=(16, 64)), ["speedup", "frames", "stages", "depth"]),
        (FULL, ["speedup", "ratio", "frames", "stages", "depth"]),
        (BATCHED, ["throughput", "speedup", "batch", "stages", "depth"]),
        (Grid(("stock",), batch_sizes=(1, 8)), ["throughput", "stages"]),
        (Grid(("stock", "plain"), batch_sizes=(8,)), ["speedup", "stages"]),
        (Grid(("stock", "plain"), (16, 64)), ["speedup", "frames", "stages"]),
        (Grid(("stock", "plain")), ["speedup", "stages"]),
        (Grid(("sd", "specvlm"), prune_ratios=(0.5, 0.9)), ["ratio", "stages", "depth"]),
    ],
)
def test_there_is_a_plot_for_what_varies(grid: Grid, names: list[str]) -> None:
    found = plots(made(grid))
    assert [one.name for one in found] == names
    for one in found:
        ElementTree.fromstring(one.svg)
        assert "currentColor" in one.svg
        assert "#010203" not in one.svg


def test_plots_without_a_baseline_have_no_speedups() -> None:
    report = made(Grid(("sd", "specvlm"), prune_ratios=(0.5, 0.9)))
    (ratio, *_) = plots(report)
    words = "".join(ElementTree.fromstring(ratio.svg).itertext())
    assert "accepted tokens a round" in words
    assert "times" not in words


def test_throughput_is_drawn_for_every_method_over_every_batch_size() -> None:
    throughput, _, batch, *_ = plots(made(BATCHED))
    words = list(ElementTree.fromstring(throughput.svg).itertext())
    for label in (
        "stock",
        "plain",
        "sd auto",
        "specvlm 0.9 auto",
        "1",
        "4",
        "8",
        "16",
        "32",
        "videos an hour",
    ):
        assert label in words, label
    assert "stock, batch 4" not in words, "a line is of all batch sizes"
    words = list(ElementTree.fromstring(batch.svg).itertext())
    assert "stock" not in words, "what the others are compared with has no line of its own"
    assert "end to end, times stock" in words
    assert batch.note == "Against stock at the same batch size."


def test_lines_over_other_things_are_of_one_batch_size() -> None:
    grid = Grid(num_frames=(16, 64), prune_ratios=(0.0, 0.5, 0.9), trees=("static",), batch_sizes=(1, 4))
    found = {one.name: list(ElementTree.fromstring(one.svg).itertext()) for one in plots(made(grid))}
    assert "pruner specvlm, tree static, 15.5 frames, batch 4" in found["ratio"]
    assert "specvlm 0.9 static, batch 4" in found["frames"]
    assert "specvlm 0.9 static, 15.5 frames" in found["throughput"]


def test_tables_of_batches_have_their_size_and_what_passes_in_an_hour() -> None:
    report = REPORTS["batches"]
    text = page(report)
    rows = Reader(text).rows
    head, *figures = rows[: len(report.summaries) + 1]
    assert head == "method batch,videos per hour,p10 to p90 over turns,tokens per s,mean batch".replace(
        " batch,", ",batch,", 1
    ).split(",")
    for row, one in zip(figures, report.summaries, strict=True):
        turns = one.videos_per_hour_turns
        assert row[0] == one.configuration.label
        assert row[1] == row[5] == str(one.configuration.batch_size)
        assert row[2] == f"{one.videos_per_hour:,.0f}"
        assert turns is not None
        assert row[3] == f"{turns.p10:,.0f} to {turns.p90:,.0f}"
    assert re.search(
        r"Most videos an hour: <b>plain, batch 32</b>, against stock at the same batch size", text
    )
    assert text.count("<tr class=begins>") == 4 * 4, "four tables of five batch sizes"
    spread = next(row for row in rows if row[:2] == ["plain", "4"] and " to " in row[-1] and len(row) == 4)
    found = report.summaries[5].speedup("stock")
    assert found is not None
    assert found.e2e_turns is not None
    assert spread[3] == f"{found.e2e_turns.p10:.2f} to {found.e2e_turns.p90:.2f}"
    assert "What a step reads" not in page(made(BATCHED))
    assert "Most videos" not in page(made())


def test_repeated_videos_are_a_condition() -> None:
    report = made(BATCHED)
    its = replace(report.conditions, repeated_to=32)
    text = page(replace(report, conditions=its))
    assert "eight clips: 8 videos, repeated to 32 for the largest batch" in text


def test_lines_that_do_not_fit_are_counted() -> None:
    grid = Grid(num_frames=(8, 16), prune_ratios=tuple(number / 20 for number in range(20)))
    report = made(grid)
    (frames,) = [one for one in plots(report) if one.name == "frames"]
    lines = len(grid.configurations(8)) - 1
    assert lines > MOST_SERIES
    assert frames.note == f"Shown are the first {MOST_SERIES} of {lines}; the table has all."


def test_every_stage_has_a_name_and_a_colour_of_its_own() -> None:
    assert STAGE_NAMES.keys() == STAGE_COLOURS.keys() == set(STAGES)
    assert len(set(STAGE_COLOURS.values())) == len(set(STAGE_NAMES.values())) == len(STAGES)


def test_importing_the_page_costs_no_plotting_library() -> None:
    program = "import sys, specvlm.bench.page; print({'matplotlib', 'torch', 'PIL'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_what_holds_for_all_figures_is_a_condition() -> None:
    report = replace(made(FULL), stopped=True)
    report = replace(report, conditions=replace(report.conditions, frame_multiple=2))
    text = page(report)
    assert "<dt>peak memory</dt><dd>2.3 GB, of the process with all methods</dd>" in text
    assert "peak memory" not in Reader(text).rows[0]
    assert "16 frames asked, 15.5 read: videos have no more; 64 frames asked" in text
    assert "<dt>stopped</dt>" in text
    on_device = replace(report, conditions=replace(report.conditions, peak_memory_of="device"))
    head, row, *_ = Reader(page(on_device)).rows
    assert row[head.index("peak memory")] == "2.3 GB"


def test_depths_of_several_rows_stand_below_each_other_and_say_when_they_are_cut() -> None:
    one = replace(made().summaries[-1], acceptance_per_depth=(0.5, None, *(7 * [0.25])))
    text = page(replace(made(), summaries=(one,)))
    cells = next(row for row in Reader(text).rows if row[-1].endswith("…"))
    assert cells[-1] == "0.50 \u2007\u2007\u2007- " + "0.25 " * 6 + "…"
    assert "<td class=listed>0.50" in text


def test_all_pruners_share_the_point_without_pruning() -> None:
    report = made(Grid(pruners=("specvlm", "uniform"), prune_ratios=(0.0, 0.9)))
    (ratio,) = [one for one in plots(report) if one.name == "ratio"]
    assert "pruner uniform, tree" in ratio.svg, "a line, so two points"


def test_a_report_of_one_video_is_told_in_the_singular() -> None:
    report: BenchReport = made()
    its = replace(report.conditions, videos=("a.mp4",), cores=1, threads=1)
    text = page(replace(report, conditions=its))
    assert "eight clips: 1 video<" in text
    assert "1 core, 1 thread<" in text
