"""What a reading child says is data: it is understood, or refused, and never more than that."""

from __future__ import annotations

import json
import os
import random
import signal
from typing import Any

import pytest

from specvlm.config import FrameSettings
from specvlm.records import VideoSource
from specvlm_cli.readers import endings, messages
from specvlm_cli.readers.jobs import Limits, ReadJob
from specvlm_cli.readers.messages import ReaderReport, Said, report_of
from specvlm_cli.readers.shared import MOST_BYTES, MisreportError

_SOURCE = VideoSource(2.5, 29.97, 640, 480, "pyav 18.1.0", 0.25, ("truncated", "damaged"), 1 << 40, -5)


@pytest.mark.parametrize("path", [b"/a/b.mp4", b"/\xff\xfe\n\x00.mp4", "/\u202e\U0001f600.mp4".encode()])
@pytest.mark.parametrize("root", [None, b"/\xff"])
def test_a_job_arrives_as_it_was_sent(path: bytes, root: bytes | None) -> None:
    settings = FrameSettings(fps=0.1 + 0.2, start_s=1 / 3, end_s=1e9, backend="pyav", min_decoded=0.25)
    job = ReadJob(0, path, settings, 2, root)
    line = messages.job_line(job)
    assert messages.job_of(line) == job
    assert line.count(b"\n") == 1


def test_a_report_arrives_as_it_was_sent() -> None:
    began = messages.began_line("open", 0) + messages.began_line("pyav", 1 << 33)
    assert report_of(began) == ReaderReport("pyav", 1 << 33)
    assert report_of(b"") == ReaderReport()
    said = Said("open", "VideoNotFoundError", "no such file; check the path", transient=False)
    assert report_of(began + messages.failed_line(said)) == ReaderReport("pyav", 1 << 33, failed=said)
    read = messages.read_line((8, 4, 6, 3), _SOURCE)
    assert report_of(began + read) == ReaderReport("pyav", 1 << 33, shape=(8, 4, 6, 3), source=_SOURCE)


def test_a_reason_is_one_harmless_line() -> None:
    said = Said(
        "decode", "RuntimeError", "two\nlines \x1b[31mred \u202e \ud800 " + "x" * 9999, transient=True
    )
    failed = report_of(messages.failed_line(said)).failed
    assert failed is not None
    assert failed.error.startswith(r"two lines \x1b[31mred \u202e \ud800 xx")
    assert failed.error.isprintable()
    assert len(failed.error) <= 2000


_BAD_FACTS: dict[str, list[Any]] = {
    "duration_s": [-1.0, float("nan"), float("inf"), "1", None, True, [], 10**400],
    "fps": [-0.1, float("-inf"), {}],
    "width": [-1, 1.5, "640", None, True, 1 << 64],
    "backend": ["", "a\nb", "\x1b[0m", 7, "x" * 99, None],
    "flags": [
        "damaged",
        ["damaged", "damaged"],
        ["damaged", "truncated"],
        ["fine"],
        [["damaged"]],
        [1],
        None,
    ],
    "size_bytes": [-1, 0.5],
    "mtime_ns": [0.5, "0", 1 << 70],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, bad in _BAD_FACTS.items() for value in bad]
)
def test_facts_without_sense_are_refused(name: str, value: Any) -> None:
    line = json.dumps({"shape": [8, 4, 6, 3], "source": _SOURCE._asdict() | {name: value}}).encode()
    with pytest.raises(MisreportError):
        report_of(line)


@pytest.mark.parametrize(
    "shape",
    [
        [],
        [8, 4, 6],
        [8, 4, 6, 4],
        [8, 4, 6, 3, 1],
        [0, 4, 6, 3],
        [8, -4, 6, 3],
        [8, 4.0, 6, 3],
        [True, 4, 6, 3],
        [1 << 40, 4, 6, 3],
        [8, 1 << 40, 6, 3],
        "8463",
        {"0": 8},
        None,
    ],
)
def test_impossible_shapes_are_refused(shape: object) -> None:
    line = json.dumps({"shape": shape, "source": _SOURCE._asdict()}).encode()
    with pytest.raises(MisreportError):
        report_of(line)


def test_mutated_reports_are_understood_or_refused() -> None:
    rng = random.Random(0)
    said = Said("decode", "VideoDecodeError", "damaged", transient=False)
    good = [
        messages.began_line("decord", 9) + messages.read_line((8, 4, 6, 3), _SOURCE),
        messages.began_line("open", 0) + messages.failed_line(said),
    ]
    refused = 0
    for _ in range(4000):
        data = bytearray(rng.choice(good))
        for _ in range(rng.randrange(1, 6)):
            place = rng.randrange(len(data))
            change = rng.randrange(3)
            if change == 0:
                data[place] = rng.choice(b'0123456789-.e"[]{}:,\\untf\n \xff')
            elif change == 1:
                del data[place : place + rng.randrange(1, 9)]
            else:
                data[place:place] = data[rng.randrange(len(data)) :][: rng.randrange(9)]
            data = data or bytearray(b"{")
        try:
            report = report_of(bytes(data))
        except MisreportError:
            refused += 1
            continue
        assert report.failed is None or report.failed.stage in ("open", "decode")
        assert (report.shape is None) == (report.source is None)
    assert 2000 < refused < 4000


def test_too_much_is_refused() -> None:
    with pytest.raises(MisreportError, match="more than 65536 bytes"):
        report_of(b" " * (MOST_BYTES + 1))


_LIMITS = Limits(timeout_s=60.0)


@pytest.mark.parametrize(
    ("began", "status", "killed", "expected"),
    [
        ("pyav", signal.SIGKILL, True, ("decode", "DecodeTimeout", False)),
        ("open", signal.SIGKILL, True, ("open", "DecodeTimeout", True)),
        (None, signal.SIGALRM, False, ("decode", "DecodeTimeout", False)),
        ("decord", signal.SIGXCPU, False, ("decode", "DecodeTimeout", False)),
        ("decord", signal.SIGABRT, False, ("decode", "DecoderCrashed", False)),
        ("pyav", signal.SIGKILL, False, ("decode", "DecoderCrashed", True)),
        ("pyav", 0, False, ("decode", "DecoderCrashed", False)),
        (None, messages.NOT_STARTED, False, ("open", "VideoUnavailableError", True)),
    ],
)
def test_an_end_without_words_has_a_reason(
    began: str | None, status: int, killed: bool, expected: tuple[str, str, bool]
) -> None:
    said = endings.of(ReaderReport(began=began), status, killed=killed, limits=_LIMITS)
    assert (said.stage, said.error_type, said.transient) == expected
    assert said.error.isprintable()
    assert "; " in said.error, "the fix follows the reason"
    assert os.sep not in said.error


def test_processor_time_follows_from_wall_time() -> None:
    assert [Limits(timeout_s=seconds).whole_cpu_s() for seconds in (0.1, 60, 0.75)] == [1, 120, 2]
    assert [Limits(cpu_s=seconds).whole_cpu_s() for seconds in (0.1, 3.2)] == [1, 4]
