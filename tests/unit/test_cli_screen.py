"""How far a run is, what of it is drawn, how it ended, and the log file."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from specvlm.words import amount, counted
from specvlm_cli.caption.outcome import (
    Captioning,
    CaptionSpread,
    Figures,
    LiveStatus,
    Outcome,
    PlainSpeedup,
    Running,
    Tally,
)
from specvlm_cli.console.live import drawn
from specvlm_cli.console.log import LogFile
from specvlm_cli.console.meter import (
    FEWEST,
    WINDOW_S,
    Ended,
    Last,
    Meter,
    PaceMeter,
    Rates,
    Standing,
    line,
    name_of,
)
from specvlm_cli.console.report import ending, summary
from specvlm_cli.console.words import between, duration, over_plain, per_hour, per_s, rate, share
from specvlm_cli.exits import ExitCode
from tests.cli.saying import HOSTILE, claim, compared, failure, harm, row

DECODE = PlainSpeedup(11, 2.02, 1.84, 2.44, of_totals=2.05, mean_batch_size=7.54)
END_TO_END = PlainSpeedup(11, 1.77, 1.61, 1.96, of_totals=1.78, mean_batch_size=7.54)
STATUS = LiveStatus(reading=2, ready=3, ready_bytes=1_200_000_000, generating=1, workers=4, retrying=1)
BUSY = Standing(
    todo=345,
    captioned=11,
    failed=1,
    elapsed_s=38.4,
    rates=Rates(3.2, 1125.0, 512.0),
    running=Running(4.45, DECODE, END_TO_END),
    kinds=(("decode:VideoDecodeError", 2), ("open:NotAVideoError", 1), ("a:A", 1), ("b:B", 1)),
    status=STATUS,
    last=Last("clip.mp4", "A blue circle. " * 20),
)


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


# Words


def test_times_and_counts_read_well() -> None:
    assert [duration(one) for one in (3.4, 75, 3700, 176_400)] == [
        "3 s",
        "1 min 15 s",
        "1 h 01 min",
        "2 d 01 h",
    ]
    assert (counted(1, "video"), counted(2, "video")) == ("1 video", "2 videos")
    assert (per_hour(1125.4), per_hour(0.52), per_s(512.3)) == (
        "1,125 videos/h",
        "0.5 videos/h",
        "512 tokens/s",
    )
    assert [amount(one) for one in (0, 999, 1_200_000_000, 3 * 10**15)] == [
        "0 bytes",
        "999 bytes",
        "1.2 GB",
        "3000.0 TB",
    ]
    assert (rate(3.21), rate(12345.6)) == ("3.2", "12,346")


def test_an_estimate_is_a_range_of_one_decimal() -> None:
    assert between(1.84, 2.36) == "1.8x to 2.4x"
    assert between(1.96, 2.04) == "about 2.0x"
    assert (over_plain(7.54), over_plain(None)) == ("over plain at batch size 7.5", "over plain")


def test_a_share_is_never_rounded_to_nothing_or_to_all() -> None:
    assert [share(part, 1000) for part in (0, 1, 500, 999, 1000)] == ["0 %", "<1 %", "50 %", ">99 %", "100 %"]


# Pace


def ended_every(each_s: float, videos: int) -> tuple[PaceMeter, float]:
    """Every fourth video fails."""
    found = PaceMeter(0.0)
    for number in range(1, videos + 1):
        found.ended(number * each_s, Ended(number, number - number // 4, 100 * number))
    return found, videos * each_s


def test_there_is_no_pace_before_a_video_has_ended() -> None:
    assert PaceMeter(0.0).rates(100.0) == PaceMeter(0.0).overall() == Rates()


def test_pace_stays_between_two_videos_and_slows_down_when_none_comes() -> None:
    found, now_s = ended_every(10.0, 4)
    assert [found.rates(now_s + later).each_s for later in (0.0, 9.0)] == [10.0, 10.0]
    assert found.rates(now_s + 60.0) == Rates(20.0, pytest.approx(3 * 3600 / 80.0), 5.0)
    assert found.rates(now_s) == found.overall() == Rates(10.0, pytest.approx(3 * 3600 / 40.0), 10.0)


def test_failures_are_no_videos_per_hour() -> None:
    found = PaceMeter(0.0)
    found.ended(10.0, Ended(5, 0, 0))
    assert found.rates(10.0) == Rates(2.0, None, None)


def test_pace_forgets_a_slow_beginning() -> None:
    found = PaceMeter(0.0)
    found.ended(300.0, Ended(1, 1, 0))
    for number in range(2, 400):
        found.ended(300.0 + number, Ended(number, number, 0))
    assert found.rates(699.0).each_s == pytest.approx(1.0, abs=0.02)
    assert found.overall().each_s == pytest.approx(699.0 / 399)


@pytest.mark.parametrize(("each_s", "videos"), [(0.001, 200_000), (1.0, 1000), (600.0, 100)])
def test_the_window_is_bounded_and_long_enough(each_s: float, videos: int) -> None:
    found, now_s = ended_every(each_s, videos)
    assert found.rates(now_s).each_s == pytest.approx(each_s, rel=0.01)
    assert len(found._marks) <= WINDOW_S + FEWEST + 2
    assert found._latest.ended.videos - found._marks[0].ended.videos >= FEWEST


# The meter and its line


def test_the_line_is_honest_at_the_start() -> None:
    clock = Clock()
    meter = Meter(10, clock)
    assert line(meter.standing()) == "0/10 · 0 failed · time left not known yet"
    clock.now_s += 4.0
    meter.captioned(claim(), [compared()])
    assert line(meter.standing()) == (
        "1/10 · 0 failed · 900 videos/h · 2.8 tokens/s · about 36 s left · decode 2.00x · end to end 1.50x · "
        "over plain at batch size 4.0 · 3.00 accepted/round"
    )


def test_videos_are_counted_not_rows() -> None:
    clock = Clock()
    meter = Meter(5, clock)
    clock.now_s += 1.0
    meter.captioned(claim(), [row(prompt_index=0), row(prompt_index=1)])
    meter.failed(failure())
    standing = meter.standing()
    assert (standing.captioned, standing.failed, standing.ended) == (1, 1, 2)
    assert standing.kinds == (("decode:VideoDecodeError", 1),)


def test_after_a_resume_counts_go_on_and_rates_are_of_this_start_alone() -> None:
    clock = Clock()
    meter = Meter(10, clock, before=(85, 5))
    assert line(meter.standing()) == "90/100 · 5 failed · time left not known yet"
    clock.now_s += 4.0
    meter.captioned(claim(), [row()])
    said = line(meter.standing())
    assert said.startswith("91/100 · 5 failed · 900 videos/h · ")
    assert " · about 36 s left · " in said
    meter.failed(failure())
    assert line(meter.standing()).startswith("92/100 · 6 failed · ")
    assert meter.standing().ended == 2


def test_the_bar_begins_where_the_last_start_ended() -> None:
    shown = drawn(Meter(10, Clock(), before=(90, 0)).standing(), 80, 24).plain
    assert (shown.count("━"), shown.count("─")) == (18, 2)


def test_after_the_end_time_stands_still_and_pace_is_of_all_up_to_the_last_row() -> None:
    clock = Clock()
    meter = Meter(2, clock)
    meter.state(STATUS)
    for wait_s in (9.0, 1.0):
        clock.now_s += wait_s
        meter.captioned(claim(), [row()])
    clock.now_s += 2.0
    meter.stop()
    clock.now_s += 1000.0
    assert line(meter.standing()) == "2/2 · 0 failed · 720 videos/h · 2.2 tokens/s · 3.00 accepted/round"
    assert meter.standing().elapsed_s == 12.0


def test_the_line_says_what_is_going_on() -> None:
    assert line(BUSY) == (
        "12/345 · 1 failed · 1,125 videos/h · 512 tokens/s · 17 min 46 s left · decode 2.05x · end to end 1.78x · "
        "over plain at batch size 7.5 · 4.45 accepted/round · reading 2 · ready 3 (1.2 GB) · generating 1 of 4 · "
        "1 to try again"
    )


def test_the_line_gives_estimates_as_a_range() -> None:
    both = replace(BUSY, running=Running(None, DECODE, END_TO_END, estimated=True), status=None)
    assert line(both).endswith(
        " left · decode 1.8x to 2.4x · end to end 1.6x to 2.0x · estimated over plain at batch size 7.5"
    )
    one = replace(both, running=Running(None, None, END_TO_END, estimated=True))
    assert line(one).endswith(" left · end to end 1.6x to 2.0x · estimated over plain at batch size 7.5")


def test_a_row_without_a_path_goes_by_its_id() -> None:
    assert name_of(claim("x.mp4")) == "x.mp4"
    nameless = claim()
    assert name_of(replace(nameless, item=replace(nameless.item, path=b"", id="row 7"))) == "row 7"


# The display


@pytest.mark.parametrize("width", [1, 5, 20, *range(39, 201, 23)])
@pytest.mark.parametrize("standing", [Standing(0), Standing(10**7), BUSY])
def test_no_line_of_the_display_is_too_wide(standing: Standing, width: int) -> None:
    lines = drawn(standing, width, 20).plain.split("\n")
    assert max(map(cell_len, lines)) <= width
    assert len(lines) <= 12 or width < 39


def test_the_display_shows_everything_at_any_sensible_width() -> None:
    for width in (39, 79, 199):
        shown = drawn(BUSY, width, 20).plain
        for part in [*line(BUSY).split(" · "), "2 decode:VideoDecodeError", "and 1 more kind", "38 s so far"]:
            assert part in shown
        assert shown.splitlines()[-1].startswith("clip.mp4: A blue circle.")


def test_the_bar_grows() -> None:
    lengths = [drawn(Standing(100, captioned=done), 79, 9).plain.count("━") for done in (0, 50, 99, 100, 200)]
    assert lengths == [0, 9, 18, 19, 19]


def test_hostile_names_and_captions_stay_on_their_line() -> None:
    for text in HOSTILE:
        shown = drawn(replace(BUSY, last=Last(text, text), kinds=((f"open:{text}", 1),)), 60, 20).plain
        assert harm(shown.replace("\n", "")) == []
        assert len(shown.splitlines()) <= len(drawn(BUSY, 60, 20).plain.splitlines()) + 1


# The ending


def outcome(**changes: Any) -> Outcome:
    return replace(Outcome(ExitCode.OK, "out", found=3, done=2, failed=1, pending=0), **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "nothing to do: 2 done, 1 failed, 0 to do in out; --retry-failed tries"),
        ({"found": 0}, "no videos found"),
        ({"figures": Figures(), "wall_s": 61.0}, "in out, 1 min 01 s"),
        ({"figures": Figures(), "stopped": "SIGTERM"}, "stopped by SIGTERM: 2 done"),
    ],
)
def test_one_line_says_how_it_ended(changes: dict[str, Any], words: str) -> None:
    assert words in ending(outcome(**changes))


def values(table: str) -> dict[str, str]:
    """Return the table as GitHub reads it, below its heading."""
    lines = table.splitlines()
    assert set(lines[1]) == {"|", "-", " "}
    cells = [re.split(r"(?<!\\)\|", one)[1:-1] for one in lines]
    assert {len(one) for one in cells} == {2}
    return {name.strip(): value.strip() for name, value in cells[2:]}


def test_the_table_says_it_all_on_one_screen() -> None:
    tally = Tally()
    tally.add(compared(2.0, 1.5))
    tally.add(compared(3.0, 1.5, prompt_index=1, video_decode_s=0.0))
    tally.fail(failure())
    kinds = tuple((f"decode:Kind{number}", 9 - number) for number in range(8))
    captioning = Captioning(60.0, 2, 1.2)
    ended = outcome(figures=tally.figures(), failed_now=1, wall_s=70.0, captioning=captioning)
    table = summary(ended, kinds)
    assert len(table.splitlines()) < 27
    assert table.startswith("| specvlm ")
    found = values(table)
    assert list(found)[:6] == [
        *("videos per hour", "tokens per second", "decode speedup", "end-to-end speedup"),
        *("identical to plain", "videos"),
    ]
    del found[""]
    assert found == {
        "videos per hour": "60, 2 comparisons with plain included",
        "tokens per second": "0.4",
        "decode speedup": "2.50x over plain at batch size 4.0, 2 measured",
        "end-to-end speedup": "1.50x over plain at batch size 4.0, 2 measured",
        "identical to plain": "2/2 captions",
        "videos": "3 found, 2 done, 1 failed, 0 to do",
        "this start": "2 captions, 1 video failed",
        "wall time": "1 min 10 s, captioning 1 min 00 s of it",
        "waiting for input": "1 % of the time, with slots free",
        "target": "fake/target",
        "draft": "fake/draft",
        "device": "fake",
        "batch size": "4.0 on average",
        "tokens": "22, 5.0/s while decoding",
        "accepted per round": "3.00 draft tokens",
        "tokens per round": "4.00, the bonus token included",
        "time by stage": "video decode 7 %, preprocess 7 %, vision 7 %",
        "failures by kind": (
            "9 decode:Kind0, 8 decode:Kind1, 7 decode:Kind2, 6 decode:Kind3, 5 decode:Kind4, 9 of other kinds"
        ),
        "failures file": "`out/failures`",
        "run folder": "`out`",
    }


def test_the_table_does_not_claim_what_was_not_measured() -> None:
    tally = Tally()
    tally.add(row())
    found = values(summary(outcome(figures=tally.figures())))
    assert found["decode speedup"] == found["end-to-end speedup"]
    assert found["decode speedup"].startswith("not measured; --baseline-sample")
    for name in ("identical to plain", "error of estimates", "videos per hour", "waiting for input"):
        assert name not in found


def test_the_table_calls_an_estimate_an_estimate() -> None:
    figures = Figures(captions=1, drafts=("small",), decode_estimated=DECODE)
    found = values(summary(outcome(figures=figures)))
    assert found["decode speedup"] == "1.8x to 2.4x over plain at batch size 7.5, estimated"
    assert found["end-to-end speedup"].startswith("not measured")


def test_the_table_gives_measured_and_estimated_and_the_error_between() -> None:
    off = CaptionSpread(8, 1.01, 0.92, 1.125)
    figures = Figures(captions=9, drafts=("small",), decode=END_TO_END, decode_estimated=DECODE)
    table = summary(outcome(figures=replace(figures, estimate_over_measured=off)))
    assert [line.split("|")[2].strip() for line in table.splitlines() if "| decode speedup" in line] == [
        "1.78x over plain at batch size 7.5, 11 measured",
        "1.8x to 2.4x over plain at batch size 7.5, estimated",
    ]
    assert values(table)["error of estimates"] == "-8 % to +12 % (p10 to p90), 8 captions"


def test_the_table_of_plain_decoding_speaks_of_no_speedup() -> None:
    tally = Tally()
    tally.add(row(num_drafts=0, num_accepted_tokens=0, draft_model=None))
    found = values(summary(outcome(figures=tally.figures())))
    assert found["draft"] == "none: plain decoding"
    assert "decode speedup" not in found
    assert "accepted per round" not in found


def test_a_start_in_which_all_failed_has_a_table_too() -> None:
    ended = outcome(figures=Figures(), failed_now=1, failures_file="out/failures/part-00000.parquet")
    found = values(summary(ended, (("open:NotAVideoError", 1),)))
    assert found["this start"] == "0 captions, 1 video failed"
    assert found["failures file"] == "`out/failures/part-00000.parquet`"
    assert "target" not in found


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_folder_makes_no_other_table(text: str) -> None:
    table = summary(outcome(out=text, figures=Figures(), failed=0))
    assert harm(table.replace("\n", "")) == []
    assert set(values(table)) == {"videos", "this start", "wall time", "run folder"}


def test_the_table_is_as_narrow_as_the_terminal_where_its_values_are() -> None:
    table = summary(outcome(out="x" * 300, figures=Figures()), (), 80).splitlines()
    assert max(map(len, table[:-2])) < 80
    assert "x" * 300 in table[-1], "a long path stays in one piece"


# The log file


def texts(log: Path) -> list[str]:
    """Return the lines of a log without their times."""
    lines = log.read_text().splitlines()
    stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d (.*)"
    return [found[1] if (found := re.fullmatch(stamp, one)) else one for one in lines]


def test_a_log_that_was_moved_goes_on_under_its_name(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "log")
    log.line("one")
    (tmp_path / "log").rename(tmp_path / "log.1")
    log.line("two")
    log.follow()
    log.line("three")
    (tmp_path / "log").unlink()
    log.follow()
    log.follow()
    log.line("four")
    log.close()
    assert texts(tmp_path / "log.1") == ["one", "two"]
    assert texts(tmp_path / "log") == ["four"]


def test_a_log_whose_folder_is_gone_is_no_harm(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    log = LogFile(folder / "log")
    (folder / "log").unlink()
    folder.rmdir()
    log.follow()
    assert log.line("to nobody") is None
    folder.mkdir()
    log.follow()
    log.line("back")
    assert texts(folder / "log") == ["back"]
    log.close()


def test_a_full_disk_is_told_once_and_tears_no_other_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = LogFile(tmp_path / "log")
    room = [30]
    write = os.write

    def full(file: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(28, "No space left on device")
        written = write(file, data[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(os, "write", full)
    assert [log.line("first"), log.line("second")] == ["No space left on device", None]
    room[0] = 1000
    assert log.line("third") is None
    log.close()
    found = texts(tmp_path / "log")
    assert len(found) == 2
    assert found[1] == "third"


def test_two_logs_in_one_file_do_not_mix(tmp_path: Path) -> None:
    logs = [LogFile(tmp_path / "log") for _ in range(2)]
    for number in range(100):
        logs[number % 2].line(f"line {number}")
    for log in logs:
        log.close()
    assert texts(tmp_path / "log") == [f"line {number}" for number in range(100)]


def test_a_pipe_that_nobody_reads_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="No such device"):
        LogFile(tmp_path / "pipe")
