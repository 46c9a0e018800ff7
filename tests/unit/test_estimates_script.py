"""`benchmarks/estimates.py` on made-up rows: which count, what it prints, and what it refuses."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.cli.made import Video, make_run

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def estimates() -> Iterator[Any]:
    """The script as a module."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("estimates")
    finally:
        sys.path.remove(str(BENCHMARKS))


def run(out: Path, ratios: Sequence[float | None], *, measured_s: float = 0.02, **changes: Any) -> Path:
    """Make a run folder with a caption for each ratio of estimated to measured time; None: no estimate."""
    made = [
        Video(
            f"id{number}",
            b"/v/%d.mp4" % number,
            row={
                "speedup_source": "measured",
                "baseline_token_s": measured_s,
                "estimated_token_s": None if ratio is None else ratio * measured_s,
                "mean_batch_size": 8.0,
            }
            | changes,
        )
        for number, ratio in enumerate(ratios)
    ]
    return make_run(out, [made[::2], made[1::2]], part_rows=40)


def cells(table: str) -> dict[str, list[str]]:
    """Return the lines of the table by the name of the run."""
    lines = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| ")]
    return {name.strip(): [one.strip() for one in rest] for name, *rest in lines[1:]}


def test_ratios_are_reported_by_run_and_over_all(
    estimates: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(tmp_path / "one", [0.5 + number / 100 for number in range(101)])
    second = run(tmp_path / "two", [2.0, None], mean_batch_size=1.0, measured_s=0.04)
    estimates.main([str(first), str(second)])
    said = capsys.readouterr().out
    assert cells(said) == {
        str(first): ["101", "8.0", "1.00", "0.60", "1.40", "45.0%", "+0.0%"],
        str(second): ["1", "1.0", "2.00", "2.00", "2.00", "100.0%", "+100.0%"],
        "all": ["102", "7.9", "1.00", "0.60", "1.41", "45.9%", "+1.9%"],
    }
    assert said.splitlines()[-4:] == [
        "target_model: fake/target",
        "draft_model: fake/draft",
        "device: fake",
        "specvlm_version: 0.1.0",
    ]


def test_a_parquet_file_is_read_too(
    estimates: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(tmp_path / "out", [1.0, 3.0, None])
    (tmp_path / "out/captions/.part-00000-00009.parquet").write_text("unfinished")
    for given in (out, out / "captions", out / "captions/part-00000-00000.parquet"):
        estimates.main([str(given), "--least", "1"])
        found = cells(capsys.readouterr().out)
        assert found[str(given)][0] == ("1" if given.is_file() else "2")


@pytest.mark.parametrize(
    "changes",
    [{"speedup_source": "estimated"}, {"speedup_source": None}, {"baseline_token_s": None}],
)
def test_captions_without_both_times_do_not_count(
    estimates: Any, tmp_path: Path, changes: dict[str, Any]
) -> None:
    out = run(tmp_path / "out", [1.0], **changes)
    with pytest.raises(
        SystemExit, match=r"^0 captions have a measured and an estimated plain time, 1 are needed"
    ):
        estimates.main([str(out), "--least", "0"])


def test_too_few_captions_are_not_published(estimates: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^99 captions .* 100 are needed"):
        estimates.main([str(run(tmp_path / "out", [1.0] * 99))])


def test_what_is_no_run_is_refused_in_one_line(estimates: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no Parquet files here"):
        estimates.main([str(tmp_path)])
    out = run(tmp_path / "out", [1.0])
    part = min((out / "captions").iterdir())
    pq.write_table(pq.read_table(part).drop_columns(["estimated_token_s"]), part)
    with pytest.raises(SystemExit, match="has no column estimated_token_s; an earlier version wrote it"):
        estimates.main([str(out)])


def test_help_says_how_to_use_it(estimates: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        estimates.main(["--help"])
    assert "--baseline-sample 1.0" in capsys.readouterr().out
