"""The reading processes: every video has one outcome within its limits, and nothing of it reaches another."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from specvlm.config import FrameSettings
from specvlm.records import Frames
from specvlm.video import decord_reader, read_video
from specvlm_cli.exits import FatalError
from specvlm_cli.process import python_command
from specvlm_cli.readers import DecodingPool, Limits, ReadFailure, ReadJob, ReadVideo, SharedFrames, pool
from tests import video_files
from tests.cli import readers

LATEST_S = 10.0  # after its limit, a read is over, on a busy machine too
SHORT = Limits(timeout_s=0.4, frames_bytes=1 << 20)
PATIENT = Limits(timeout_s=30.0, address_space_bytes=512 << 20, frames_bytes=1 << 20)
needs_decord = pytest.mark.skipif(not decord_reader.is_installed(), reason="decord has no wheel here")
needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="reads /proc")


def job(act: str, key: int = 0) -> ReadJob:
    return ReadJob(key, os.fsencode(act), FrameSettings(backend="pyav"), 1)


def outcomes(
    reading: DecodingPool, jobs: Sequence[ReadJob], workers: int
) -> dict[int, ReadVideo | ReadFailure]:
    """Have all of them read; fails where a job has no outcome, or more than one."""
    waiting, found = list(jobs), dict[int, ReadVideo | ReadFailure]()
    while waiting or len(reading):
        while waiting and len(reading) < workers:
            reading.submit(waiting.pop(0))
        select.select(reading.descriptors(), [], [], reading.next_deadline_s())
        for outcome in reading.collect():
            assert outcome.key not in found
            found[outcome.key] = outcome
    assert found.keys() == {one.key for one in jobs}
    return found


def outcome(reading: DecodingPool, one: ReadJob) -> ReadVideo | ReadFailure:
    return outcomes(reading, [one], 1)[one.key]


def failure(reading: DecodingPool, one: ReadJob) -> ReadFailure:
    found = outcome(reading, one)
    assert isinstance(found, ReadFailure)
    assert found.error.isprintable()
    return found


def assert_good(found: ReadVideo | ReadFailure, expected: Frames | None = None) -> None:
    assert isinstance(found, ReadVideo), found
    expected = readers.frames() if expected is None else expected
    frames = found.frames()
    found.close()
    np.testing.assert_array_equal(frames.pixels, expected.pixels)
    np.testing.assert_array_equal(frames.times_s, expected.times_s)
    assert frames.source is not None
    assert expected.source is not None
    assert frames.source._replace(decode_s=0) == expected.source._replace(decode_s=0)


def children(process: int) -> list[int]:
    try:
        text = Path(f"/proc/{process}/task/{process}/children").read_text()
    except OSError:
        return []
    return [int(number) for number in text.split()]


def below(process: int) -> list[int]:
    """All processes that this one has started, and those that they have."""
    found = [one for child in children(process) for one in (child, *below(child))]
    return [one for one in found if "tracker" not in Path(f"/proc/{one}/cmdline").read_text()]


def is_gone(process: int) -> bool:
    """It has ended, though nobody may have waited for it: not every container's first process does."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def wait_until(condition: Any, within_s: float, what: str) -> None:
    until_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until_s, what
        time.sleep(0.01)


def read_server_of(reading: DecodingPool) -> int:
    process = reading._client._process
    assert process is not None
    return process.pid


@pytest.fixture(scope="module")
def short() -> Iterator[DecodingPool]:
    with DecodingPool(4, SHORT, reader=readers.READER) as reading:
        yield reading


@pytest.fixture(scope="module")
def patient() -> Iterator[DecodingPool]:
    with DecodingPool(4, PATIENT, reader=readers.READER) as reading:
        yield reading


def test_nothing_outlives_its_limit(short: DecodingPool) -> None:
    assert_good(outcome(short, job("good")))  # the read server is up
    began_s = time.monotonic()
    acts = ["hang", "hang and ignore signals", "spin", "stop"]
    found = outcomes(short, [job(act, key) for key, act in enumerate(acts)], 4)
    assert time.monotonic() - began_s < SHORT.timeout_s + LATEST_S
    for one in found.values():
        assert isinstance(one, ReadFailure)
        assert (one.stage, one.error_type, one.transient) == ("decode", "DecodeTimeout", False)
        assert one.error.startswith("not read within 0.4 s; give it more time (--decode-timeout)")


def test_processor_time_is_limited_too() -> None:
    limits = Limits(timeout_s=30.0, cpu_s=1.0)
    with DecodingPool(1, limits, reader=readers.READER) as reading:
        began_s = time.monotonic()
        assert failure(reading, job("spin")).error_type == "DecodeTimeout"
        assert time.monotonic() - began_s < 20


@pytest.mark.parametrize(
    ("act", "error_type", "words", "transient"),
    [
        ("abort", "DecoderCrashed", "ended by SIGABRT", False),
        ("segfault", "DecoderCrashed", "ended by SIGSEGV", False),
        ("exit", "DecoderCrashed", "ended with exit code 3", False),
        ("kill itself", "DecoderCrashed", "killed from outside; see whether memory ran out", True),
        ("allocate", "DecoderOutOfMemory", "takes more than the 512 MiB", False),
        ("write to disk", "OSError", "File too large", False),
        ("raise", "RuntimeError", r"first line \x1b[31msecond line \xff", False),
        ("unavailable", "VideoUnavailableError", "stale file handle; try again", True),
    ],
)
def test_every_end_has_its_reason(
    act: str, error_type: str, words: str, transient: bool, patient: DecodingPool
) -> None:
    found = outcomes(patient, [job(act, 1), job("good", 2)], 2)
    assert_good(found[2])
    assert isinstance(found[1], ReadFailure)
    assert found[1].error_type == error_type
    assert words in found[1].error
    assert found[1].transient is transient


def test_a_memory_bomb_stays_in_its_process(patient: DecodingPool) -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    before = resident_bytes()
    assert failure(patient, job("allocate")).error_type == "DecoderOutOfMemory"
    assert resident_bytes() - before < 8 << 20


@pytest.mark.parametrize("lie", readers.LIES)
def test_what_a_child_says_is_not_believed(lie: str, patient: DecodingPool) -> None:
    before = len(os.listdir("/proc/self/fd"))
    found = failure(patient, job(lie))
    assert (found.error_type, found.transient) == ("DecoderMisreported", False)
    assert len(os.listdir("/proc/self/fd")) == before


@needs_proc
def test_processes_that_a_child_started_end_with_it(patient: DecodingPool) -> None:
    assert_good(outcome(patient, job("leave processes")))
    wait_until(lambda: not children(read_server_of(patient)), 20.0, "they live on")


def test_what_decoders_print_is_not_seen(patient: DecodingPool, capfd: pytest.CaptureFixture[str]) -> None:
    assert_good(outcome(patient, job("print")))
    assert capfd.readouterr() == ("", "")


@needs_proc
def test_children_get_nothing_that_is_not_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("DECORD_EOF_RETRY_MAX", "abc")  # decord would abort at its import
    monkeypatch.setenv("PYTHONSTARTUP", "x")
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.set_inheritable(lock.fileno(), True)
        with DecodingPool(1, PATIENT, reader=readers.READER) as reading:
            environment = json.loads(failure(reading, job("environment")).error)
            descriptors = json.loads(failure(reading, job("descriptors")).error)
            assert json.loads(failure(reading, job("modules")).error) == []
            mine = os.readlink(f"/proc/{read_server_of(reading)}/fd/0")
            read_server = {
                os.readlink(entry) for entry in Path(f"/proc/{read_server_of(reading)}/fd").iterdir()
            }
    assert not [name for name in environment if "TOKEN" in name or name.startswith("DECORD")]
    assert set(environment) <= {*pool_environment(), "LC_CTYPE"}
    assert [name.partition(":")[0] for name in descriptors if "/proc/" not in name] == ["/dev/null"] * 3 + [
        "socket"
    ]
    assert mine == "/dev/null"
    assert str(tmp_path / "lock") not in read_server


def pool_environment() -> set[str]:
    from specvlm_cli.readers import read_client

    return {*read_client._KEPT, *read_client._SET}


@needs_proc
def test_nothing_is_left_after_many_reads(patient: DecodingPool) -> None:
    assert_good(outcome(patient, job("good")))
    before = os.listdir("/proc/self/fd")
    for found in outcomes(patient, [job("good", key) for key in range(200)], 4).values():
        assert_good(found)
    assert os.listdir("/proc/self/fd") == before
    wait_until(lambda: not children(read_server_of(patient)), 20.0, "a child is left")
    inside = Path(f"/proc/{read_server_of(patient)}/fd")
    assert len(list(inside.iterdir())) <= 8


@needs_proc
def test_signals_that_stop_a_run_stop_no_read(patient: DecodingPool) -> None:
    patient.submit(job("slow"))
    wait_until(lambda: patient.collect() or children(read_server_of(patient)), 20.0, "no child")
    for process in (read_server_of(patient), *children(read_server_of(patient))):
        assert os.getsid(process) != os.getsid(0), "Ctrl-C reaches it"
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(process, number)
    found = list[ReadVideo | ReadFailure]()
    wait_until(lambda: found.extend(patient.collect()) or found, 20.0, "no outcome")
    assert_good(found[0])


@needs_proc
def test_a_lost_read_server_is_replaced_and_its_videos_are_read() -> None:
    with DecodingPool(2, PATIENT, reader=readers.READER) as reading:
        assert_good(outcome(reading, job("good")))
        lost = read_server_of(reading)
        for key in range(2):
            reading.submit(job("slow", key))
        wait_until(lambda: len(children(lost)) == 2, 20.0, "no children")
        orphans = children(lost)
        os.kill(lost, signal.SIGKILL)
        for found in collect_all(reading, 2):
            assert_good(found)
        assert read_server_of(reading) != lost
        wait_until(lambda: all(map(is_gone, [lost, *orphans])), 20.0, "they live on")


def collect_all(reading: DecodingPool, count: int) -> list[ReadVideo | ReadFailure]:
    found = list[ReadVideo | ReadFailure]()
    wait_until(lambda: found.extend(reading.collect()) or len(found) == count, 20.0, "no outcome")
    assert len(reading) == 0
    return found


@needs_proc
def test_a_video_whose_read_server_is_lost_twice_fails_and_may_be_tried_again() -> None:
    with DecodingPool(1, PATIENT, reader=readers.READER) as reading:
        assert_good(outcome(reading, job("good")))
        reading.submit(job("hang"))
        assert kill_read_server(reading) == []
        found = kill_read_server(reading)
        assert isinstance(found[0], ReadFailure)
        assert (found[0].error_type, found[0].transient) == ("DecoderCrashed", True)
        assert_good(outcome(reading, job("good")))


def kill_read_server(reading: DecodingPool) -> list[ReadVideo | ReadFailure]:
    """Once a child reads; return what comes of it while the pool takes note."""
    lost, found = read_server_of(reading), list[ReadVideo | ReadFailure]()
    wait_until(lambda: found.extend(reading.collect()) or children(lost), 20.0, "no child")
    os.kill(lost, signal.SIGKILL)
    wait_until(
        lambda: found.extend(reading.collect()) or read_server_of(reading) != lost, 20.0, "not replaced"
    )
    return found


def test_a_read_server_that_cannot_start_ends_the_run_with_one_line() -> None:
    with (
        pytest.raises(
            FatalError, match="cannot be started: ModuleNotFoundError: No module named 'no_such'"
        ) as caught,
        DecodingPool(1, reader="no_such:reader") as reading,
    ):
        outcome(reading, job("good"))
    assert "\n" not in str(caught.value)


def test_a_process_that_does_not_die_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_GIVE_UP_S", 0.3)
    with DecodingPool(1, SHORT, reader=readers.READER) as reading:
        with monkeypatch.context() as patch:
            patch.setattr(reading._client, "kill", lambda _: None)  # as of one that hangs in the kernel
            found = failure(reading, job("hang and ignore signals"))
        assert (found.stage, found.error_type, found.transient) == ("open", "DecodeTimeout", True)
        assert "hangs in the system" in found.error
        assert_good(outcome(reading, job("good")))
        left = [read_server_of(reading), *children(read_server_of(reading))]
        assert len(left) == 2, "it is still there"
    wait_until(lambda: all(map(is_gone, left)), 20.0, "it lives on")


def test_cancelling_kills_and_the_pool_goes_on() -> None:
    with DecodingPool(2, PATIENT, reader=readers.READER) as reading:
        assert_good(outcome(reading, job("good")))
        for key in range(2):
            reading.submit(job("hang", key))
        with pytest.raises(AssertionError, match="the pool is full"):
            reading.submit(job("good", 2))
        reading.cancel()
        assert (len(reading), reading.next_deadline_s(), reading.collect()) == (0, None, [])
        assert not children(read_server_of(reading))
        assert_good(outcome(reading, job("good")))
        read_server = read_server_of(reading)
        reading.submit(job("hang"))
    assert is_gone(read_server)
    assert reading.descriptors() == []


_PARENT = """
import sys
from specvlm_cli.readers import DecodingPool, Limits
from tests.cli.test_decoding_pool import below, job, read_server_of, readers, wait_until
import os, signal
reading = DecodingPool(2, Limits(timeout_s=600), reader=readers.READER)
for key in range(2):
    reading.submit(job("hang and ignore signals", key))
wait_until(lambda: len(below(os.getpid())) == 3, 20, "not started")
print(*below(os.getpid()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@needs_proc
def test_no_process_outlives_a_coordinator_that_is_killed() -> None:
    done = subprocess.run(
        python_command(f"exec({_PARENT!r})"), capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, "")
    processes = [int(number) for number in done.stdout.split()]
    assert len(processes) == 3
    wait_until(lambda: all(map(is_gone, processes)), 20.0, "an orphan")


@pytest.mark.parametrize("step", ["open", "pyav", "decord"])
@pytest.mark.parametrize("act", ["hang", "abort"])
def test_a_reader_that_fails_is_asked_once(step: str, act: str, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    with DecodingPool(1, SHORT, reader="tests.cli.readers:read_in_steps") as reading:
        found = outcome(reading, job(f"{step}:{act}:{journal}"))
    assert journal.read_text().split() == ["pyav"]
    assert isinstance(found, ReadFailure)
    if act == "hang":
        assert (found.stage == "open", found.transient) == (step == "open", step == "open")


@pytest.mark.parametrize(("size_bytes", "enough"), [(1000, False), (2_000_000, False), (20_000_000, True)])
def test_a_large_file_may_take_longer(size_bytes: int, enough: bool, tmp_path: Path) -> None:
    film = tmp_path / "film.ts"
    with film.open("wb") as file:
        file.truncate(size_bytes)
    with DecodingPool(1, SHORT, reader="tests.cli.readers:read_slowly") as reading:
        found = outcome(reading, job(str(film)))
    if enough:
        assert_good(found)
        return
    assert isinstance(found, ReadFailure)
    limit_s = SHORT.timeout_s + size_bytes / 5e6
    assert (
        found.error
        == f"not read within {limit_s:.3g} s; give it more time (--decode-timeout) or fewer frames"
    )


def test_no_file_is_so_large_that_it_may_take_for_ever() -> None:
    assert Limits().extra_s(1 << 62) == 3600.0
    assert Limits(timeout_s=10).whole_cpu_s(Limits().extra_s(50_000_000)) == 40


def test_more_frames_than_allowed_are_refused(tmp_path: Path) -> None:
    clip = video_files.write_video(tmp_path / "clip.mp4", frames=60)
    limits = Limits(frames_bytes=60 * 96 * 64 * 3)
    with DecodingPool(1, limits) as reading:
        settings = FrameSettings(num_frames=60)
        found = failure(reading, ReadJob(0, os.fsencode(clip), settings, 1))
        assert (found.stage, found.error_type) == ("decode", "VideoDecodeError")
        assert found.error.startswith("its 60 frames of 96x64 take 1 MiB, and 1 MiB are allowed; give fewer")
        few = ReadJob(0, os.fsencode(clip), FrameSettings(num_frames=59), 1)
        assert_good(outcome(reading, few), read_video(clip, few.settings))


@pytest.mark.parametrize("backend", ["auto", "pyav"])
def test_frames_are_those_of_the_library(backend: Literal["auto", "pyav"], tmp_path: Path) -> None:
    kinds = ["h264", "vp9", "h264 ts", "h264 rotated 90"]
    paths = [video_files.maker(tmp_path)(kind) for kind in kinds]
    damaged = video_files.blank_packets(paths[0], tmp_path / "damaged.mp4", 24, 24)
    cut = video_files.cut(paths[1], tmp_path / "cut.webm", 0.7)
    settings = FrameSettings(num_frames=30, max_pixels=4000, backend=backend)
    with DecodingPool(2) as reading:
        jobs = [
            ReadJob(key, os.fsencode(path), settings, 2) for key, path in enumerate([*paths, damaged, cut])
        ]
        found = outcomes(reading, jobs, 2)
        for one in jobs:
            assert_good(found[one.key], read_video(one.path, settings, frame_multiple=2))


def test_a_name_that_is_no_text_and_a_root(tmp_path: Path) -> None:
    clip = video_files.write_video(tmp_path / "clip.mp4", frames=5)
    odd = os.fsencode(tmp_path) + b"/\xff\n%d.mp4"
    os.link(clip, odd)
    with DecodingPool(1) as reading:
        inside = ReadJob(0, odd, FrameSettings(), 1, root=os.fsencode(tmp_path))
        assert isinstance(outcome(reading, inside), ReadVideo)
        (tmp_path / "below").mkdir()
        outside = ReadJob(0, odd, FrameSettings(), 1, root=os.fsencode(tmp_path / "below"))
        assert failure(reading, outside).error_type == "PathDeniedError"
        long = ReadJob(0, b"/x" * 100_000, FrameSettings(), 1)
        assert failure(reading, long).stage == "open"


_RECEIVER = """
import pickle, sys
from specvlm_cli.readers import open_frames
frames = open_frames({descriptor}, pickle.loads({shared!r}))
frames.pixels[0, 0, 0, 0] ^= 255  # stays in that process
assert "torch" not in sys.modules
print(frames.pixels.shape, int(frames.pixels.sum()), frames.times_s.tolist(), frames.source)
"""


def test_frames_go_to_another_process_without_a_copy(patient: DecodingPool) -> None:
    found = outcome(patient, job("good"))
    assert isinstance(found, ReadVideo)
    descriptor, shared = found.handle()
    assert isinstance(shared, SharedFrames)
    assert found.size_bytes == shared.size_bytes == os.fstat(descriptor).st_size
    program = _RECEIVER.format(descriptor=descriptor, shared=pickle.dumps(shared))
    done = subprocess.run(
        python_command(f"exec({program!r})"),
        capture_output=True,
        text=True,
        check=False,
        pass_fds=[descriptor],
    )
    good = readers.frames()
    changed = int(good.pixels.sum()) + 255 - 2 * int(good.pixels[0, 0, 0, 0])
    assert (done.stdout, done.stderr) == (
        f"{good.pixels.shape} {changed} {good.times_s.tolist()} {good.source}\n",
        "",
    )
    assert_good(found)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system cannot seal memory")
def test_nobody_can_change_frames_that_were_handed_over(patient: DecodingPool) -> None:
    found = outcome(patient, job("good"))
    assert isinstance(found, ReadVideo)
    descriptor = found.handle()[0]
    for change in (
        lambda: os.write(descriptor, b"x"),
        lambda: os.ftruncate(descriptor, 0),
        lambda: os.ftruncate(descriptor, 1 << 20),
    ):
        with pytest.raises(PermissionError):
            change()
    frames = found.frames()
    found.close()
    np.testing.assert_array_equal(frames.pixels, readers.frames().pixels)
    with pytest.raises(AssertionError, match="it is closed"):
        found.frames()
