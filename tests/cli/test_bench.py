"""`specvlm bench`: what it prints and writes, on the demo pair and on reports made by hand; what it refuses."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import fields, replace
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from specvlm.bench.records import STAGES, BenchReport, Configuration, Left, Stages, TimedCaption
from specvlm.bench.suite import BenchStep
from specvlm.bench.summing import summarise
from specvlm.preset import find_preset
from specvlm_cli import app, bench_files
from specvlm_cli.commands.bench_flags import BenchFlags
from specvlm_cli.console.bench import BenchTalk, tell
from tests.bench_reports import BATCHED, CONDITIONS, made
from tests.cli.terminal import Terminal

ROOT = Path(__file__).parents[2]
CLIP = ROOT / "examples" / "videos" / "two-meet.mp4"
Run = Callable[..., tuple[int, str, str]]
STOCK, PLAIN = Configuration("stock"), Configuration("plain")
OURS = Configuration("specvlm", None, "uniform", 0.9, "static")


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process; return its exit code, stdout and stderr."""

    def runs(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = app.main(["bench", *map(str, arguments)])
        return code, *capfd.readouterr()

    return runs


def sample(how: Configuration, turn: int, decode_s: float, video: str = "clip.mp4") -> TimedCaption:
    """A caption of eleven tokens, in two rounds where it is ours."""
    rounds = 2 if how.method == "specvlm" else 0
    stages = Stages(read_s=0.25, prefill_s=0.25, steps_s=decode_s)
    if rounds:
        stages = Stages(read_s=0.25, vision_s=0.25, draft_s=0.25 * decode_s, verify_s=0.75 * decode_s)
    return TimedCaption(
        configuration=how,
        video=video,
        turn=turn,
        num_frames=8,
        video_tokens=100,
        video_tokens_kept=10 if rounds else 0,
        prompt_tokens=120,
        token_ids=tuple(range(11)),
        stages=stages,
        decode_s=decode_s,
        decode_tokens=10,
        total_s=0.5 + decode_s,
        num_drafts=rounds,
        num_draft_tokens=25 * rounds,
        num_accepted_tokens=4 * rounds,
        acceptance_histogram=(0, 0, 0, 1, 0, 1) if rounds else (),
        depth_tries=(2, 2, 2, 2, 1) if rounds else (),
        peak_memory_bytes=1 << 30,
    )


def report(*more: Configuration) -> BenchReport:
    """Stock and plain in a second, ours in half a second; what else is asked for has failed."""
    samples = [sample(how, turn, 1.0) for how in (STOCK, PLAIN) for turn in (1, 2)]
    samples += [sample(OURS, turn, 0.5) for turn in (1, 2)]
    errors = dict.fromkeys(more, "its tokenizer \x1b[31mdiffers")
    return BenchReport(CONDITIONS, summarise([STOCK, *more, PLAIN, OURS], samples, errors), tuple(samples))


# On the demo pair


def test_a_bench_of_the_demo_pair(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    asked = (
        "--limit",
        1,
        "--repeat",
        1,
        "--max-new-tokens",
        24,
        "--prune-ratio",
        "0.5,0.9",
        "--tree",
        "static",
    )
    code, said, told = run(*asked, "-o", out, "--json", "-q")
    assert (code, told) == (0, "")
    assert said.count("\n") == 1, "one JSON line"
    found = json.loads(said)
    assert (found["schema"], found["left_out"]) == (1, [])
    conditions = found["conditions"]
    assert conditions["videos"] == ["one-drifts-left.mp4"]
    heads = ["specvlm-demo/qwen-head"] if find_preset("demo-head") else []
    assert conditions["target"] == "specvlm-demo/qwen-target"
    assert conditions["draft"].split(", ") == ["specvlm-demo/qwen-draft", *heads]
    assert conditions["command"] == (
        "specvlm bench --limit 1 --prune-ratio 0.5,0.9 --tree static --repeat 1 --max-new-tokens 24"
    )
    summaries = {one["label"]: one for one in found["summaries"]}
    assert list(summaries)[:3] == ["stock", "assisted", "plain"]
    assert "different tokenizers" in summaries["assisted"]["error"], "the demo pair's vocabularies differ"
    for label, one in summaries.items():
        if label not in ("stock", "assisted"):
            assert one["exact_match"] == 1.0, label
            assert one["speedups"][0]["baseline"] == "stock"
            assert one["limit"]
    drafting = [one for one in found["summaries"] if one["method"] in ("sd", "specvlm")]
    assert [one["prune_ratio"] for one in drafting] == [0.0, 0.5, 0.9]
    seen = [one["video_tokens_kept"] for one in drafting]
    assert seen[0] == drafting[0]["video_tokens"] > seen[1] > seen[2] > 0
    rows = pq.read_table(out / "bench.parquet").to_pylist()
    assert {(row["method"], row["prune_ratio"]) for row in rows} == {
        *(("stock", None), ("plain", None), ("sd", 0.0), ("specvlm", 0.5), ("specvlm", 0.9)),
        *(("head", None) for _ in heads),
    }
    assert {tuple(row["token_ids"]) for row in rows} == {tuple(rows[0]["token_ids"])}
    for row in rows:
        assert sum(row[stage] or 0.0 for stage in STAGES) == pytest.approx(row["total_s"])
        assert (row["vision_s"] is None) == (row["method"] == "stock") != (row["prefill_s"] is None)
    page = (out / "bench.html").read_text()
    assert "What the draft saw of one-drifts-left.mp4" in page, "the sheet of the first video"
    assert "data:image/png;base64," in page
    assert sorted(path.name for path in out.iterdir()) == ["bench.html", "bench.parquet"]


def test_batches_of_the_demo_pair(run: Run, tmp_path: Path) -> None:
    asked = ("--limit", 1, "--repeat", 2, "--max-new-tokens", 6, "--tree", "chain", "--num-frames", 4)
    code, said, told = run(*asked, "--batch-size", "1,3", "-o", tmp_path, "--json", "-q")
    assert (code, told) == (0, "")
    found = json.loads(said)
    assert "--batch-size 1,3" in found["conditions"]["command"]
    assert found["conditions"]["videos"] == ["one-drifts-left.mp4"]
    assert found["conditions"]["repeated_to"] == 3
    heads = ["head chain"] if find_preset("demo-head") else []
    labels = ["stock", "plain", "sd chain", "specvlm 0.9 chain", *heads]
    assert [(one["label"], one["batch_size"]) for one in found["summaries"]] == [
        (label, size) for size in (1, 3) for label in labels
    ], "transformers' assisted generation takes no batch"
    for one in found["summaries"]:
        assert one["error"] is None
        assert one["videos_per_hour_turns"].keys() == {"p10", "median", "p90"}
        if one["label"] != "stock":
            assert one["exact_match"] == 1.0, one["label"]
            assert {"p10", "median", "p90"} == one["speedups"][0]["e2e_turns"].keys()
    rows = pq.read_table(tmp_path / "bench.parquet").to_pylist()
    assert {(row["batch_size"], row["mean_batch_size"]) for row in rows} == {(1, 1.0), (3, 3.0)}
    assert len(rows) == 2 * 2 * 3 * len(labels)
    assert len({tuple(row["token_ids"]) for row in rows}) == 1
    assert "Videos an hour over the batch size" in (tmp_path / "bench.html").read_text()


@pytest.mark.parametrize(
    ("flags", "ways"),
    [((), ["", " no-exact"]), (("--exact",), [""]), (("--no-exact",), [" no-exact"])],
)
def test_in_bfloat16_near_ties_are_compared_both_ways(
    run: Run, tmp_path: Path, flags: tuple[str, ...], ways: list[str]
) -> None:
    asked = ("--methods", "stock,sd", "--tree", "chain", "--limit", 1, "--repeat", 1, "--max-new-tokens", 4)
    code, said, _ = run(
        *asked, "--num-frames", 2, "--dtype", "bfloat16", *flags, "-o", tmp_path, "--json", "-q"
    )
    assert code == 0
    found = json.loads(said)
    assert [one["label"] for one in found["summaries"]] == ["stock", *(f"sd chain{way}" for way in ways)]
    assert [one["settled_share"] is None for one in found["summaries"]] == [True, *(False for _ in ways)]
    assert " ".join(flags) in found["conditions"]["command"]
    rows = pq.read_table(tmp_path / "bench.parquet").to_pylist()
    ours = [row["exact"] for row in rows if row["method"] == "sd"]  # turns begin with one or the other
    assert sorted(ours) == sorted(not way for way in ways)
    assert all(row["settled_tokens"] >= 0 for row in rows)


def test_an_automatic_batch_is_that_of_caption(run: Run) -> None:
    asked = ("--methods", "plain", "--limit", 1, "--repeat", 1, "--max-new-tokens", 2, "--num-frames", 2)
    code, said, _ = run(*asked, "--batch-size", "2,auto", "--json", "-q")
    assert code == 0
    assert [one["batch_size"] for one in json.loads(said)["summaries"]] == [2, 32]


def test_a_quick_check_of_batches_says_which_turns_it_left_out(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specvlm_cli.commands.bench.QUICK_S", -1.0)
    asked = ("--methods", "plain", "--repeat", 3, "--max-new-tokens", 2, "--num-frames", 2)
    code, _, told = run(*asked, "--batch-size", 8)
    assert code == 0
    assert "-1 s no further turn was begun: 1 of 3 measured; --limit 8 takes all" in told


def test_videos_that_cannot_be_read_are_left_out(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("not a video\n" * 50)
    asked = ("--repeat", 1, "--max-new-tokens", 4, "--methods", "plain,stock")
    code, said, told = run(CLIP, tmp_path, *asked, "--num-frames", "2,4")
    assert code == 3
    assert [line for line in told.splitlines() if "left out" in line] == [
        next(line for line in told.splitlines() if line.startswith("left out: text.mp4: "))
    ], "once, although two numbers of frames were asked for"
    assert "stock, 4 frames: " in said
    code, said, told = run(tmp_path, *asked)
    assert (code, said) == (1, "")
    assert "specvlm: error: no video could be read; " in told


STOPS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.mark.parametrize(("number", "expected"), STOPS)
@pytest.mark.parametrize("captions", [3, 7])
def test_a_bench_that_is_stopped_keeps_whole_turns(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    expected: int,
    captions: int,
) -> None:
    """Of two methods: two captions warm up, each two more are a turn."""
    from specvlm.bench.measure import Measurer

    measure, asked = Measurer.measure, []

    def until_stopped(self: Measurer, how: Configuration, *more: Any) -> TimedCaption:
        asked.append(how)
        if len(asked) > captions:
            os.kill(os.getpid(), number)
        return measure(self, how, *more)

    monkeypatch.setattr(Measurer, "measure", until_stopped)
    before = signal.getsignal(signal.SIGTERM)
    flags = (
        "--methods",
        "stock,plain",
        "--repeat",
        4,
        "--max-new-tokens",
        4,
        "--prompt",
        "What is it?",
        "-q",
    )
    code, said, told = run(*flags, "--num-frames", 2, "--limit", 2, "-o", tmp_path)
    assert code == expected
    assert signal.getsignal(signal.SIGTERM) is before
    if captions == 3:
        assert (said, told) == ("", "stopped early: nothing is kept, no turn was whole\n")
        assert list(tmp_path.iterdir()) == []
        return
    assert told == "stopped early: kept 2 whole turns of 1 video\n"
    assert "stopped early: kept 2 whole turns of 1 video" in said
    rows = pq.read_table(tmp_path / "bench.parquet").to_pylist()
    assert sorted((row["turn"], row["method"]) for row in rows) == [
        (turn, method) for turn in (1, 2) for method in ("plain", "stock")
    ]
    assert "kept 2 whole turns of 1 video" in (tmp_path / "bench.html").read_text()


def test_the_quick_check_says_what_it_did_not_measure(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specvlm_cli.commands.bench.QUICK_S", -1.0)
    code, said, told = run("--methods", "plain", "--repeat", 1, "--max-new-tokens", 2)
    assert code == 0
    assert "-1 s no further clip was begun: 1 of 8 measured; --limit 8 takes all" in told
    assert "the example clips: 1 video\n" in said


def test_frames_that_differ_from_those_asked_for_are_told_once(run: Run) -> None:
    code, said, _ = run(
        CLIP, "--methods", "plain", "--repeat", 1, "--max-new-tokens", 2, "--num-frames", "3,2"
    )
    assert code == 0
    assert said.count("3 frames asked, 2 read: this model takes multiples of 2") == 1
    assert "plain, 3 frames" not in said


# What is refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "stock,fast"], "--methods 'fast' is unknown; choose from stock, assisted, plain, sd"),
        (["--methods", ","], "--methods ',' is an empty list; give e.g. stock,"),
        (["--prune-ratio", "0.5,x"], "--prune-ratio 0.5,x: 'x' is no number; give e.g. 0,0.5,0.9"),
        (["--prune-ratio", "0.5,1.5"], "--prune-ratio 1.5 is out of range"),
        (["--pruner", "best"], "--pruner 'best' is unknown"),
        (["--tree", "bush"], "--tree 'bush' is unknown"),
        (["--num-frames", "16,0"], "--num-frames 0 is out of range"),
        (["--batch-size", "1,0"], "--batch-size 0 is out of range; give 1 to 1024"),
        (["--batch-size", "1025"], "--batch-size 1025 is out of range; give 1 to 1024"),
        (["--batch-size", "all"], "--batch-size 'all' is no whole number; give e.g. 1,8,32 or auto"),
        (["--num-frames", "1.5"], "--num-frames '1.5' is no whole number; give e.g. 16,64"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0 is out of range"),
        (["--repeat", "0"], "--repeat 0 is out of range; give 1 to 1000"),
        (["--limit", "0"], "--limit 0 is out of range; give 1 to "),
        (
            ["--prompt", "a", "--prompt", "b"],
            "--prompt was given 2 times, and bench asks one question; give one",
        ),
        (
            ["--draft", "none"],
            "--methods assisted needs a draft, and there is none; give --draft, or --methods s",
        ),
        (["--target", "some/model"], "--methods assisted needs a draft"),
        (["--draft", "none", "--methods", "plain,sd"], "--methods sd needs a draft"),
        (["--preset", "nope"], "--preset nope is unknown"),
        (["--prompt", " "], "--prompt is empty"),
        (["nowhere.mp4"], "nowhere.mp4: no such file or folder"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(run: Run, arguments: list[str], words: str) -> None:
    code, said, told = run(*arguments)
    assert (code, said) == (2, "")
    last = told.splitlines()[-1]
    assert last.startswith("specvlm: error: ")
    assert words in last


def test_a_folder_that_cannot_be_made_is_refused_before_the_measuring(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, told = run("-o", tmp_path / "file" / "out")
    assert code == 2
    assert "Not a directory; give a folder that can be made" in told


def test_a_folder_without_videos_is_an_error(run: Run, tmp_path: Path) -> None:
    code, _, told = run(tmp_path)
    assert code == 1
    assert "no videos there" in told


def test_wrong_flags_are_refused_without_torch() -> None:
    program = """
import sys
from specvlm_cli.app import main
assert main(["bench", "--tree", "bush"]) == 2
assert main(["bench", "--draft", "none"]) == 2
print({"torch", "transformers", "torchvision", "matplotlib"} & set(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "set()\n"


# What is shown and written


def test_the_tables_off_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    tell(report(Configuration("assisted")))
    lines = capsys.readouterr().out.splitlines()
    above, below, stock, assisted, plain, ours = lines[lines.index("Speed") + 1 :][:6]
    assert above.split() == "ms/ decode decode end to end end to end same as video draft".split()
    assert below.split() == "method token x stock x plain x stock x plain accepted stock tokens sees".split()
    assert ours.split() == "specvlm uniform 0.9 static 50.00 2.00 2.00 1.50 1.50 4.00 100 % 100 10".split()
    assert stock.split() == "stock 100.00 1.00 1.00 1.00 1.00 100".split()
    assert stock.index(" 1.00") + 5 == below.index("x stock") + 7, "under its name"
    assert assisted.split() == ["assisted", "not", "run"]
    assert plain.split()[2] == "1.00"
    assert "assisted: not run: its tokenizer \\x1b[31mdiffers" in lines, "harmless on a terminal"
    assert lines[lines.index("Limits") + 1] == "stock: decoding, token by token, takes 67 % of the time"
    assert lines[-1].startswith(
        "specvlm uniform 0.9 static: verifying 26 nodes costs 1.9 plain steps; at the cost of one, "
    )
    rounds = lines[lines.index("Rounds") + 3]
    assert rounds.split()[:5] == "specvlm uniform 0.9 static 26.0".split()
    assert "1.00 1.00 1.00 0.50 1.00" in rounds
    peaks = [line for line in lines if "peak" in line]
    assert len(peaks) == 1, "a process's peak says nothing of one method"
    assert peaks[0] == "peak memory  1.1 GB, of the process with all methods"


@pytest.mark.parametrize("width", [60, 80, 130])
def test_no_table_is_wider_than_the_terminal(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda _: True)
    tell(report(Configuration("assisted")))
    lines = re.sub(r"\x1b\[[0-9]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= width
    assert "ms/" in lines[lines.index("Speed") + 1]
    tables = lines[lines.index("Speed") : lines.index("Limits")]
    told = " ".join(line.removeprefix(OURS.label) for line in tables if line.startswith(OURS.label)).split()
    assert " ".join(told) == (
        "50.00 2.00 2.00 1.50 1.50 4.00 100 % 100 10 "
        "2.00 to 2.00 2.00 to 2.00 1.50 to 1.50 1.50 to 1.50 250.0 250.0 125.0 375.0 1000.0 "
        "26.0 100.00 62.50 187.50 0 % 2.00 1.00 1.00 1.00 1.00 0.50 1.00"
    ), "nothing is lost"


def test_off_a_terminal_lines_have_80_characters(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    tell(report(Configuration("assisted")))
    assert 60 < max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_a_table_begins_with_a_line_of_names(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    tell(report())
    lines = capsys.readouterr().out.splitlines()
    assert not any(one == other == "" for one, other in itertools.pairwise(lines))


def test_stages_add_up_to_all(capsys: pytest.CaptureFixture[str]) -> None:
    tell(report())
    lines = capsys.readouterr().out.splitlines()
    begin = lines.index("Where the time goes, in ms a video")
    *stages, whole = [
        float(figure)
        for line in lines[begin : lines.index("Rounds")]
        if line.startswith(OURS.label)
        for figure in line.removeprefix(OURS.label).split()
    ]
    assert sum(stages) == pytest.approx(whole, abs=0.05 * len(stages))
    assert any("preprocess" in line for line in lines) is False, "columns without a word are left out"


def test_depths_begin_on_the_left(capsys: pytest.CaptureFixture[str]) -> None:
    its = report()
    *others, ours = its.summaries
    shallow = replace(ours, acceptance_per_depth=(0.5, 0.25), configuration=replace(OURS, tree="chain"))
    tell(replace(its, summaries=(*others, shallow, ours)))
    lines = capsys.readouterr().out.splitlines()
    place = next(line for line in lines if "1, 2, ..." in line).index("1, 2, ...")
    shown = [line[place:] for line in lines if line[place:].startswith(("0.50 0.25", "1.00 1.00"))]
    assert shown == ["0.50 0.25", "1.00 1.00 1.00 0.50 1.00"]


def test_a_devices_peak_is_a_column(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    its = report()
    tell(replace(its, conditions=replace(its.conditions, peak_memory_of="device")))
    lines = capsys.readouterr().out.splitlines()
    stock = lines[lines.index("Speed") + 3]
    assert stock.endswith(" 1.1 GB")
    assert [line for line in lines if "peak" in line] == [lines[lines.index("Speed") + 1]]


def test_frames_are_a_column_where_there_are_several(capsys: pytest.CaptureFixture[str]) -> None:
    few, many = Configuration("stock", 9), Configuration("stock", 64)
    samples = (sample(few, 1, 1.0), replace(sample(many, 1, 2.0), num_frames=64))
    tell(BenchReport(CONDITIONS, summarise([few, many], samples), samples))
    lines = capsys.readouterr().out.splitlines()
    assert lines[lines.index("Speed") + 2].split()[:2] == ["method", "frames"]
    assert [line.split()[1] for line in lines[lines.index("Speed") + 3 :][:2]] == ["8", "64"], (
        "read, not asked"
    )
    assert "frames       9 frames asked, 8 read: videos have no more" in lines
    assert "stock, 64 frames: decoding, token by token, takes 80 % of the time" in lines


def test_batches_have_a_table_of_what_passes_in_an_hour(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    its = made(BATCHED)
    tell(replace(its, conditions=replace(its.conditions, repeated_to=32)))
    lines = capsys.readouterr().out.splitlines()
    assert "clips        eight clips: 8 videos, repeated to 32 for the largest batch" in lines
    begin = lines.index("Throughput, in wall time")
    assert lines[begin + 2].split() == "method batch per hour over turns per s batch".split()
    one = its.summaries[-1]
    turns = one.videos_per_hour_turns
    assert turns is not None
    last = lines[begin + 2 + len(its.summaries)]
    figures = (one.videos_per_hour, turns.p10, turns.p90, one.tokens_per_s)
    assert last == (
        "specvlm 0.9 auto     32  {:>8}  {:>14}  {:>6}  {:>5}".format(
            f"{figures[0]:,.0f}", f"{figures[1]:,.0f} to {figures[2]:,.0f}", f"{figures[3]:.3g}", "32"
        )
    )
    assert "specvlm 0.9 auto, batch 32: drafting costs 0.5 plain steps a round" in lines


def test_every_field_of_the_json_is_documented() -> None:
    text = (ROOT / "docs" / "bench.md").read_text()
    told = report().as_json()
    names = {*told, *told["summaries"][0], *told["summaries"][-1]["speedups"][0]} - {"schema", "baseline"}
    assert {name for name in names if f"`{name}`" not in text} == set()


def test_rows_hold_all_that_a_sample_has(tmp_path: Path) -> None:
    its = report()
    assert set(bench_files.SCHEMA.names) == set(its.samples[0].as_row())
    bench_files.write(its, bench_files.ready(tmp_path / "out"))
    bench_files.write(its, tmp_path / "out")  # a second bench replaces the first
    table = pq.read_table(tmp_path / "out" / "bench.parquet")
    assert table.num_rows == 6
    note = json.loads(table.schema.metadata[b"specvlm.bench"])
    assert note["conditions"]["target"] == CONDITIONS.target
    row = table.to_pylist()[-1]
    assert (row["method"], row["pruner"], row["acceptance_histogram"]) == (
        "specvlm",
        "uniform",
        [0, 0, 0, 1, 0, 1],
    )


def test_progress_off_a_terminal_is_a_line_now_and_then(capfd: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    talk = BenchTalk(quiet=False, clock=lambda: now[0])
    with talk.working():
        for done, now[0] in enumerate((10.0, 31.0, 40.0, 62.0)):
            talk.step(BenchStep(done, 4, f"clip\x07 {done}"))
        talk.left_out(Left("a\nb.mp4", "no video"))
        talk.failed(STOCK, "broken")
    assert capfd.readouterr().err.splitlines() == [
        "1 of 4 captions: clip\\x07 1",
        "3 of 4 captions: clip\\x07 3",
        "left out: a\\x0ab.mp4: no video",
        "stock: failed; the other methods continue",
    ]


def test_progress_on_a_terminal_is_a_bar_that_goes_away() -> None:
    file = StringIO()
    console = Console(file=file, force_terminal=True, force_interactive=True, width=100, color_system=None)
    talk = BenchTalk(quiet=False, console=console)
    before = threading.active_count()
    with talk.working():
        for done in range(3):
            talk.step(BenchStep(done, 4, f"[red]clip\x07 {done}"))
        assert threading.active_count() == before, "nothing draws while something is measured"
        talk.left_out(Left("a.mp4", "no video"))
    said = file.getvalue()
    assert "2/4" in said
    assert "[red]clip\\x07 2" in said
    terminal = Terminal(100)
    terminal.feed(said)
    assert [line for line in terminal.lines if line] == ["left out: a.mp4: no video"]


def test_quiet_says_only_what_went_wrong(capfd: pytest.CaptureFixture[str]) -> None:
    talk = BenchTalk(quiet=True, clock=lambda: 1e6)
    talk.step(BenchStep(1, 2, "clip"))
    talk.note("something")
    talk.failed(STOCK, "broken")
    talk.left_out(Left("a.mp4", "no video"))
    assert capfd.readouterr().err == "left out: a.mp4: no video\n"


def test_flags_of_lists_have_no_variable_of_captions() -> None:
    """SPECVLM_TREE holds one tree, SPECVLM_OUT a run folder: a bench must not be steered by them unseen."""
    options: dict[str, Any] = {one.name: one for one in _options()}
    for name in ("methods", "pruner", "prune_ratio", "tree", "num_frames", "batch_size", "out"):
        assert options[name].envvar is None, name
    assert options["repeat"].envvar == "SPECVLM_REPEAT"
    assert {one.name for one in fields(BenchFlags)} == set(options) | {"inputs"}


def _options() -> list[Any]:
    import typer.main

    group: Any = typer.main.get_command(app.app)
    return [
        one
        for one in group.commands["bench"].params
        if one.param_type_name == "option" and one.name != "help"
    ]
