"""Damaged, odd and sound videos, each through the reading processes, and every frame compared with the truth.

    python -m tests.faults.videos [--mutants 1000] [--seed 0] [--backend auto] [--workers 2]

The truth is in the pictures: each shows its number. A violation, and an exit code other than 0, is a video with
no outcome or two, a read that outlives its limit by more than two seconds, a sound video with a wrong frame or a
flag, a connection, a picture of a file that must not be read, a process that is left, or memory that grows here.

Damage that no decoder notices cannot be flagged; how often that was seen is counted and bounded, not excluded.
"""

from __future__ import annotations

import argparse
import os
import random
import select
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from specvlm.config import BACKENDS, BackendName, FrameSettings
from specvlm.records import Frames
from specvlm_cli.readers import DecodingPool, Limits, ReadFailure, ReadJob, ReadVideo
from tests import video_files
from tests.faults import mutants, odd_files

TIMEOUT_S = 15.0
LATEST_S = 2.0  # after its limit
MOST_GROWTH_BYTES = 64 << 20
MOST_UNSEEN = 0.1  # of damaged videos: frames that are wrong, and no flag
_EXPECTED = ("VideoDecodeError", "NotAVideoError", "DecodeTimeout", "DecoderCrashed", "DecoderOutOfMemory")
COPY_FRAMES = (3, 8, 16, 32, 60)
_RATE = video_files.RATE
_COPIED = ("h264", "h264 open gop", "h264 no b", "hevc open gop")
_FIRSTS = (5, 12, 14, 17, 23, 24, 30, 37, 41)  # of stream-copied clips; 4 x 9 are 36

Judge = Callable[[Frames], int]


@dataclass(frozen=True)
class Case:
    """One file to read.

    Attributes:
        group: Which row of the table it belongs to.
        name: Which file it is.
        path: The file.
        frames: How many frames to read.
        wrong: Counts the frames that are not what their times say.
        sound: It must give its frames, all right, and no flag.
        allowed: Errors that may come of it; None: those of damaged videos.
        root: Nothing outside it may be read; None: anything.
    """

    group: str
    name: str
    path: bytes
    frames: int
    wrong: Judge
    sound: bool = False
    allowed: tuple[str, ...] | None = None
    root: bytes | None = None


@dataclass
class Count:
    """What became of one group."""

    files: int = 0
    read: int = 0
    failed: int = 0
    flags: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    frames: int = 0
    flagged_wrong: int = 0  # frames
    unflagged: int = 0  # files
    unflagged_wrong_files: int = 0
    unflagged_wrong: int = 0  # frames
    slowest_s: float = 0.0


@dataclass
class Report:
    """What was seen.

    Attributes:
        counts: By group.
        violations: What must not be.
        growth_bytes: Memory that this process has taken meanwhile.
        connections: To the listener.
        unseen: Damaged files that gave wrong frames without a flag, by what they were made from.
    """

    counts: dict[str, Count] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    growth_bytes: int = 0
    connections: int = 0
    unseen: Counter[str] = field(default_factory=Counter)


def _by_times(times_s: Sequence[float]) -> Judge:
    def wrong(frames: Frames) -> int:
        shown = video_files.numbers_of(frames.pixels)
        return sum(
            not (number < len(times_s) and abs(times_s[number] - time_s) < 2e-3)
            for number, time_s in zip(shown, frames.times_s, strict=True)
        )

    return wrong


def _by_rate(first: int) -> Judge:
    """At a steady rate, where frame `first` is the first one that is shown."""

    def wrong(frames: Frames) -> int:
        shown = video_files.numbers_of(frames.pixels)
        return sum(
            round(time_s * _RATE) + first != n for n, time_s in zip(shown, frames.times_s, strict=True)
        )

    return wrong


def _at_any_rate(frames: Frames) -> int:
    """Where a header lies about the rate, times and numbers are still on one line."""
    shown, times_s = np.array(video_files.numbers_of(frames.pixels)), frames.times_s
    if len(shown) < 3:
        return 0
    rate = (shown[-1] - shown[0]) / (times_s[-1] - times_s[0])
    return int((np.abs(shown[0] + rate * (times_s - times_s[0]) - shown) > 0.6).sum())


def _nothing_to_see(_: Frames) -> int:
    return 0


def sound_cases(folder: Path, kinds: Sequence[str]) -> Iterator[Case]:
    """Good files of all kinds, and clips that were cut without encoding anew."""
    make = video_files.maker(folder)
    for kind in kinds:
        judge = _by_times(video_files.kind_times_s(kind))
        for frames in (8, 32):
            yield Case("sound", kind, os.fsencode(make(kind)), frames, judge, sound=True)


def copied_cases(folder: Path, clips: int) -> Iterator[Case]:
    make = video_files.maker(folder)
    wanted = [(kind, first) for first in _FIRSTS for kind in _COPIED][:clips]
    for kind, first in wanted:
        ending = "mkv" if first % 2 and kind == "h264 no b" else "mp4"
        path = video_files.copy_clip(make(kind), folder / f"{first} of {make(kind).stem}.{ending}", first)
        shown_first = first if ending == "mp4" else first - first % 12  # an edit list hides what is before
        for frames in COPY_FRAMES:
            name = f"{path.name}, {frames} frames"
            yield Case("stream-copied", name, os.fsencode(path), frames, _by_rate(shown_first), sound=True)


def odd_cases(folder: Path, port: int) -> Iterator[Case]:
    folder.mkdir()
    for odd in odd_files.write(folder, port):
        must_be_read = odd.allowed == (odd_files.SOUND,)
        judge = _nothing_to_see if odd.name.startswith("pictures") else _by_rate(0)
        yield Case("odd", odd.name, odd.path, 4, judge, must_be_read, odd.allowed, os.fsencode(folder))


def damaged_cases(folder: Path, count: int, seed: int) -> Iterator[Case]:
    make = video_files.noisy_maker(folder)
    sources = [make(kind) for kind in video_files.NOISY]
    (folder / "damaged").mkdir()
    for number in range(count):
        rng = random.Random(f"{seed}-{number}")
        source = sources[number % len(sources)]
        kinds = [*mutants.DAMAGES, *["lying"] * mutants.can_lie(source.name)]
        kind = kinds[number // len(sources) % len(kinds)]
        data = bytearray(source.read_bytes())
        lie = kind == "lying"
        damaged = mutants.lying(source.name, data, rng) if lie else mutants.DAMAGES[kind](data, rng)
        path = folder / "damaged" / f"{number}-{kind}-{source.name}"
        path.write_bytes(damaged)
        yield Case(kind, path.name, os.fsencode(path), 30, _at_any_rate if lie else _by_rate(0))


class _Bench:
    """Reads cases and judges what comes of them."""

    def __init__(self, backend: BackendName, workers: int) -> None:
        self.report = Report()
        self._backend = backend
        self._workers = workers
        self._began_s: dict[int, float] = {}

    def run(self, cases: Sequence[Case]) -> None:
        limits = Limits(timeout_s=TIMEOUT_S)
        with DecodingPool(self._workers, limits) as pool:
            resident_bytes = _resident_bytes()
            missing = set(range(len(cases)))
            for key, outcome in self._outcomes(pool, cases):
                if key not in missing:
                    self._violation(cases[key], "has two outcomes")
                missing.discard(key)
                self._judge(cases[key], outcome, time.monotonic() - self._began_s[key])
            for key in missing:
                self._violation(cases[key], "has no outcome")
            self.report.growth_bytes = _resident_bytes() - resident_bytes
        if self.report.growth_bytes > MOST_GROWTH_BYTES:
            self.report.violations.append(f"memory grew by {self.report.growth_bytes >> 20} MiB")
        self.report.violations += [f"a process is left: {name}" for name in _children()]

    def _outcomes(
        self, pool: DecodingPool, cases: Sequence[Case]
    ) -> Iterator[tuple[int, ReadVideo | ReadFailure]]:
        waiting = list(reversed(range(len(cases))))
        while waiting or len(pool):
            while waiting and len(pool) < self._workers:
                key = waiting.pop()
                settings = FrameSettings(
                    num_frames=cases[key].frames, max_pixels=1 << 15, backend=self._backend
                )
                self._began_s[key] = time.monotonic()
                pool.submit(ReadJob(key, cases[key].path, settings, 1, cases[key].root))
            select.select(pool.descriptors(), [], [], pool.next_deadline_s())
            for outcome in pool.collect():
                yield outcome.key, outcome

    def _judge(self, case: Case, outcome: ReadVideo | ReadFailure, took_s: float) -> None:
        count = self.report.counts.setdefault(case.group, Count())
        count.files += 1
        count.slowest_s = max(count.slowest_s, took_s)
        readers = 2 if self._backend == "auto" else 1
        if took_s > readers * TIMEOUT_S + LATEST_S:
            self._violation(case, f"took {took_s:.1f} s")
        if isinstance(outcome, ReadFailure):
            self._judge_failure(case, count, outcome)
            return
        frames = outcome.frames()
        outcome.close()
        self._judge_frames(case, count, frames)

    def _judge_failure(self, case: Case, count: Count, failure: ReadFailure) -> None:
        count.failed += 1
        count.errors[failure.error_type] += 1
        expected = _EXPECTED if case.allowed is None else case.allowed
        if case.sound or failure.error_type not in expected:
            self._violation(case, f"fails: {failure.error_type}: {failure.error}")

    def _judge_frames(self, case: Case, count: Count, frames: Frames) -> None:
        assert frames.source is not None
        count.read += 1
        count.frames += len(frames.pixels)
        count.flags.update(frames.source.flags)
        wrong = case.wrong(frames)
        if frames.source.flags:
            count.flagged_wrong += wrong
        else:
            count.unflagged += 1
            count.unflagged_wrong_files += wrong > 0
            count.unflagged_wrong += wrong
            self.report.unseen[case.name.rpartition("-")[2]] += wrong > 0
        if case.allowed is not None and odd_files.SOUND not in case.allowed:
            self._violation(case, "gives frames")
        if odd_files.CANARY in video_files.numbers_of(frames.pixels) and case.group == "odd":
            self._violation(case, "gives pictures of a file that must not be read")
        if case.sound and (wrong or frames.source.flags):
            self._violation(
                case, f"{wrong} wrong frames, flags {frames.source.flags}, {frames.source.backend}"
            )

    def _violation(self, case: Case, what: str) -> None:
        self.report.violations.append(f"{case.group}, {case.name!r}: {what}")


def _resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return 0


def _children() -> list[str]:
    """Command lines of the processes that are ours, where the system tells."""
    try:
        ours = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    except OSError:
        return []
    lines = [Path(f"/proc/{number}/cmdline").read_text() for number in ours]
    return [line for line in lines if "specvlm_cli.readers" in line]


def run(
    folder: Path,
    *,
    count: int,
    seed: int,
    backend: BackendName = "auto",
    workers: int = 2,
    kinds: Sequence[str] = tuple(video_files.KINDS),
    clips: int = 36,
    most_unseen: float = MOST_UNSEEN,
) -> Report:
    """Make the files in an empty folder, read them all, and say what was seen."""
    bench = _Bench(backend, workers)
    with odd_files.Listener() as listener:
        bench.run(
            [
                *sound_cases(folder, kinds),
                *copied_cases(folder, clips),
                *odd_cases(folder / "odd", listener.port),
                *damaged_cases(folder, count, seed),
            ]
        )
        bench.report.connections = listener.connections
    _judge_all(bench.report, most_unseen)
    return bench.report


def _judge_all(report: Report, most_unseen: float) -> None:
    if report.connections:
        report.violations.append(f"{report.connections} connections to the network")
    files, unseen, _ = damaged_totals(report)
    if unseen > most_unseen * files:
        report.violations.append(f"{unseen} of {files} damaged videos give wrong frames without a flag")


def damaged_totals(report: Report) -> tuple[int, int, int]:
    """Damaged files; those of them that gave wrong frames without a flag; and these frames."""
    counts = [report.counts[group] for group in (*mutants.DAMAGES, "lying") if group in report.counts]
    return (
        sum(count.files for count in counts),
        sum(count.unflagged_wrong_files for count in counts),
        sum(count.unflagged_wrong for count in counts),
    )


_COLUMNS = ("files", "read", "failed", "truncated", "damaged", "partial", "unflagged")


def table(report: Report) -> Iterator[str]:
    """What is printed."""
    yield f"{'':15}" + "".join(f"{name:>10}" for name in (*_COLUMNS, "with wrong", "(frames)", "slowest"))
    for group, count in report.counts.items():
        cells = [getattr(count, name, count.flags[name]) for name in _COLUMNS]
        cells += [count.unflagged_wrong_files, count.unflagged_wrong]
        yield f"{group:15}" + "".join(f"{cell:>10}" for cell in cells) + f"{count.slowest_s:>8.2f} s"
    errors = sum((count.errors for count in report.counts.values()), Counter[str]())
    yield "errors: " + ", ".join(f"{name} {number}" for name, number in errors.most_common())
    files, unseen, frames = damaged_totals(report)
    yield f"damaged: {files}; {unseen} give wrong frames without a flag ({frames} frames)"
    yield "of these: " + ", ".join(
        f"{name} {number}" for name, number in report.unseen.most_common() if number
    )
    yield f"memory: {report.growth_bytes / (1 << 20):+.1f} MiB in this process; connections: {report.connections}"


def main() -> int:
    """Run at full size; return the exit code."""
    parser = argparse.ArgumentParser(description="Read damaged, odd and sound videos.")
    parser.add_argument("--mutants", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = run(
            Path(folder),
            count=arguments.mutants,
            seed=arguments.seed,
            backend=arguments.backend,
            workers=arguments.workers,
        )
    print("\n".join(table(report)))
    for violation in report.violations:
        print("VIOLATION:", violation)
    print(f"{time.monotonic() - began_s:.0f} s, {len(report.violations)} violations")
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
