"""`specvlm doctor`: each check alone, on machines that are broken in its way; and all of them on this one."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specvlm.errors import SpecvlmError
from specvlm.packaged import demo_folder
from specvlm_cli.doctor import checks, machine, models, probe, readers, storage
from specvlm_cli.doctor.checks import Check, CheckVerdict
from tests.cli.conftest import Specvlm, snapshot

ROOT = Path(__file__).parents[2]
NAMES = (
    "python packages processors memory,shared memory limits job,model hub,model cache,output folder,writing locks "
    "ledger,reader pyav,reader decord,devices generation"
)


# The machinery


def test_a_check_that_raises_fails_alone() -> None:
    def look() -> CheckVerdict:
        raise RuntimeError("two\nlines")

    found = checks.examine(Check("broken", look))
    assert (found.status, found.detail) == ("fail", "RuntimeError: two lines")


def test_a_check_that_hangs_is_left_behind() -> None:
    began = time.monotonic()
    found = checks.examine(Check("hangs", lambda: time.sleep(20) or checks.ok(""), limit_s=0.1))
    assert (found.status, found.detail) == ("fail", "no answer within 0.1 s")
    assert time.monotonic() - began < 10.0


# Packages


def declare(monkeypatch: pytest.MonkeyPatch, *requirements: str, python: str = ">=3.11") -> None:
    """Have specvlm declare these packages."""
    monkeypatch.setattr(machine.metadata, "requires", lambda name: list(requirements))
    found = namedtuple("Found", "json")({"requires_python": python})
    monkeypatch.setattr(machine.metadata, "metadata", lambda name: found)


def test_packages_in_their_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version("numpy")
    declare(monkeypatch, f"numpy>={version}", "nowhere>1; python_version < '3'", "pytest>1; extra == 'dev'")
    assert machine.packages().status == "ok"
    assert "versions of all 1 fit" in machine.packages().detail


def test_packages_out_of_their_bounds_and_missing_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, "numpy>=99,<100", "specvlm-nowhere>=1.5", "rich>1")
    found = machine.packages()
    assert found.status == "fail"
    assert (
        found.detail
        == f"numpy {metadata.version('numpy')}, needed <100,>=99; specvlm-nowhere is not installed"
    )
    assert found.fix == "pip install 'numpy<100,>=99' 'specvlm-nowhere>=1.5'"


def test_an_old_python(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, python=">=4")
    assert machine.python() == CheckVerdict("fail", machine.python().detail, "specvlm needs Python >=4")
    declare(monkeypatch)
    assert machine.python().status == "ok"


# The machine


def test_memory_is_bounded_by_the_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "_meminfo", lambda: {"MemTotal": 64 * 10**9, "MemAvailable": 32 * 10**9})
    monkeypatch.setattr(machine, "_cgroup_folders", lambda controller: iter([tmp_path / "a", tmp_path]))
    (tmp_path / "a").mkdir()
    (tmp_path / "a/memory.max").write_text("max\n")
    assert machine.memory().status == "ok"
    (tmp_path / "memory.limit_in_bytes").write_text("4000000000\n")
    assert machine.memory() == CheckVerdict(
        "warn",
        "32.0 GB of 64.0 GB free, limited to 4.0 GB by the container or job",
        "a 7B model is loaded through memory; 16 GB are safe",
    )
    (tmp_path / "a/memory.max").write_text("1000000000\n")
    assert machine.memory().status == "fail"


def test_a_container_with_less_processor_than_it_shows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(machine, "_cgroup_folders", lambda controller: iter([tmp_path]))
    assert machine.processors().status == "ok"
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert "may use 1.5 at a time" in machine.processors().detail


def test_the_control_groups_of_this_process_are_found_and_lie_where_they_should() -> None:
    for folder in machine._cgroup_folders("memory"):
        assert folder.is_relative_to("/sys/fs/cgroup")


def statvfs(**values: int) -> Any:
    return namedtuple("Found", values)(**values)


def test_small_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: statvfs(f_frsize=4096, f_blocks=16384, f_bavail=16384))
    found = machine.shared_memory()
    assert (found.status, "--shm-size" in found.fix) == ("warn", True)


def test_few_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.resource, "getrlimit", lambda what: (256, 8192))
    assert machine.limits().fix == "ulimit -n 4096"


@pytest.mark.parametrize(
    ("environment", "status", "words"),
    [
        ({}, "ok", "no job scheduler"),
        ({"SLURM_JOB_ID": "7"}, "ok", "Slurm, job 7, no array"),
        (
            {"SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4"},
            "ok",
            "Slurm, job 7, --shard auto is 2/4",
        ),
        (
            {"SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "2"}
            | {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "9"},
            "warn",
            "Slurm, job 7",
        ),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "ok", "torchrun, --shard auto is 1/2"),
    ],
)
def test_the_job_that_we_are_part_of(environment: dict[str, str], status: str, words: str) -> None:
    found = machine.job(environment)
    assert found.status == status
    assert words in found.detail


# Disks


def test_a_token_is_told_of_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = storage.hub()
    assert found.status == "warn"
    assert "with a token" in found.detail
    assert "secret" not in str(found)


def test_disk_checks_leave_nothing_behind(tmp_path: Path) -> None:
    before = snapshot(tmp_path).keys()
    for look in (storage.file_system, storage.writing, storage.locking, storage.committing):
        found = look(tmp_path / "not" / "there")
        assert found.status in ("ok", "warn"), found
    assert snapshot(tmp_path).keys() == before


def test_locks_that_do_not_lock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda file, operation: None)
    assert storage.locking(tmp_path).status == "fail"


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    found = storage.writing(Path("/proc"))
    assert found.status == "fail"
    assert "cannot be written" in found.detail


MOUNTS = """22 27 0:21 / / rw,relatime - overlay overlay rw
23 27 0:22 / /data rw,relatime shared:1 - nfs4 server:/x rw
24 27 0:23 / /data/with\\040blank rw - ext4 /dev/sda rw
25 27 0:24 / /database rw - xfs /dev/sdb rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/x", "overlay"),
        ("/data", "nfs4"),
        ("/data/y", "nfs4"),
        ("/data/with blank/z", "ext4"),
        ("/database", "xfs"),
    ],
)
def test_the_mount_that_a_folder_is_on(monkeypatch: pytest.MonkeyPatch, path: str, kind: str) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self, **options: MOUNTS)
    assert storage.kind_of(Path(path)) == kind


@pytest.mark.parametrize(
    ("kind", "free", "names", "status"),
    [
        *(
            ("ext4", 10**11, 10**6, "ok"),
            ("nfs4", 10**11, 10**6, "warn"),
            ("fuse.sshfs", 10**11, 10**6, "warn"),
        ),
        *(
            ("tmpfs", 10**11, 10**6, "warn"),
            ("overlay", 10**11, 10**6, "warn"),
            ("ext4", 10**9, 10**6, "warn"),
        ),
        *(("ext4", 10**7, 10**6, "fail"), ("ext4", 10**11, 5, "fail"), ("ext4", 10**11, 500, "warn")),
    ],
)
def test_what_is_said_of_a_file_system(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, free: int, names: int, status: str
) -> None:
    monkeypatch.setattr(storage, "kind_of", lambda folder: kind)
    found = statvfs(f_frsize=1, f_bavail=free, f_favail=names, f_files=10**7)
    monkeypatch.setattr(os, "statvfs", lambda path: found)
    assert storage.file_system(tmp_path).status == status


# Reading


@pytest.mark.parametrize("look", [readers.pyav, readers.decord])
def test_both_readers_give_the_frames_that_were_asked_for(look: Any) -> None:
    found = look()
    assert found.status == "ok", found
    assert "read 8 frames" in found.detail


def test_wrong_frames_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_STEP", 11)
    original = readers.write_clip

    def other(path: Path) -> None:
        monkeypatch.setattr(readers, "_STEP", 9)
        original(path)
        monkeypatch.setattr(readers, "_STEP", 11)

    monkeypatch.setattr(readers, "write_clip", other)
    found = readers.pyav()
    assert found.status == "fail"
    assert "not those that were asked for" in found.detail


def test_a_reader_that_gives_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "write_clip", lambda path: path.write_bytes(b"no video"))
    found = readers.pyav()
    assert (found.status, "NotAVideoError" in found.detail) == ("fail", True)


# Devices and generation, from a process that may do anything


class Acted(models.Probe):
    """A probe whose process runs a program of ours."""

    def __init__(self, program: str, preset: str = "demo") -> None:
        super().__init__(preset)
        self._command = [sys.executable, "-c", program]


def said(*answers: dict[str, Any]) -> str:
    return "".join(f"print({json.dumps(answer)!r}, flush=True)\n" for answer in answers)


BUILT: dict[str, Any] = {"torch": "9.9", "cuda": None, "rocm": None, "devices": [], "threads": 2, "said": []}
GPU = {"name": "cuda:0 X1", "free": 8 * 10**9, "total": 10 * 10**9, "bf16": True}
MADE = {
    "device": "cpu",
    "loaded_s": 1.0,
    "tokens": 32,
    "same": True,
    "plain_s": 2.0,
    "ours_s": 1.0,
    "accepted": 2.0,
}


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({}, "warn", "no GPU, 2 threads"),
        ({"cuda": "12.8", "devices": [GPU]}, "ok", "cuda:0 X1, 8.0 GB of 10.0 GB free"),
        ({"devices": [{"name": "mps", "bf16": True}]}, "ok", "mps"),
        ({"devices": [GPU | {"free": 10**9}]}, "warn", "nvidia-smi"),
        ({"devices": [GPU | {"bf16": False}]}, "warn", "--dtype float16"),
        (
            {"devices": [GPU, {"name": "cuda:1 X2", "error": "no kernel image"}]},
            "fail",
            "cuda:1 X2: no kernel image",
        ),
    ],
)
def test_what_is_said_of_devices(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: dict[str, Any], status: str, words: str
) -> None:
    monkeypatch.setattr(models, "_NVIDIA", tmp_path / "none")
    monkeypatch.setattr(models, "_AMD", tmp_path / "none")
    with Acted(said(BUILT | change)) as acted:
        found = acted.devices()
    assert found.status == status
    assert words in f"{found.detail} {found.fix}"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "not built for CUDA"),
        (
            {"cuda": "13.2", "said": ["The driver is too old (found version 11040)."]},
            "driver 470.82.01; torch says: The driver",
        ),
    ],
)
def test_a_driver_without_a_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed Oct 27\nGCC 11.2.0"
    )
    monkeypatch.setattr(models, "_NVIDIA", tmp_path / "version")
    with Acted(said(BUILT | change)) as acted:
        found = acted.devices()
    assert found.status == "fail"
    assert words in found.detail


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import os; os.kill(os.getpid(), 11)", "ended with signal SIGSEGV"),
        (
            "import sys; sys.stderr.write('x\\nlibcuda.so is missing\\n'); sys.exit(3)",
            "exit code 3: libcuda.so is missing",
        ),
        (said({"error": "ImportError: no torch"}), "ImportError: no torch"),
    ],
)
def test_a_probe_that_dies_is_told_twice_and_hangs_nobody(program: str, words: str) -> None:
    with Acted(program) as acted:
        found = checks.examine(Check("devices", acted.devices))
        again = checks.examine(Check("generation", acted.generation))
    assert (found.status, again.status) == ("fail", "fail")
    assert words in found.detail
    assert "ended with" in again.detail


def test_a_probe_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "DEVICES_S", 0.2)
    with Acted("import time; time.sleep(60)") as acted:
        found = checks.examine(Check("devices", acted.devices))
        assert "no answer within 0.2 s" in found.detail
        assert "SIGKILL" in checks.examine(Check("generation", acted.generation)).detail


@pytest.mark.parametrize(
    ("change", "status"),
    [({}, "ok"), ({"same": False}, "fail"), ({"same": False, "device": "NVIDIA X1 (cuda:0)"}, "warn")],
)
def test_both_ways_of_decoding_must_agree(change: dict[str, Any], status: str) -> None:
    with Acted(said(BUILT, MADE | change)) as acted:
        acted.devices()
        assert acted.generation().status == status


def test_a_preset_that_is_not_on_disk_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with Acted("raise SystemExit(9)", "qwen2.5-vl-7b") as acted:
        found = acted.generation()
    assert found.status == "fail"
    assert found.detail == "not on disk: Qwen/Qwen2.5-VL-7B-Instruct, Qwen/Qwen2.5-VL-3B-Instruct"


def test_what_the_probe_draws_suits_a_model() -> None:
    assert probe.drawn().pixels.dtype == np.uint8
    assert probe.drawn().pixels.shape[-1] == 3


LOOKED_AT: dict[str, Any] = {
    "family": "qwen3_vl",
    "parameters": 8_767_123_696,
    "context": 262144,
    "prompt": 211,
    "video": 144,
    "frames": 8,
    "draft": "small",
    "warnings": [],
}


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        (
            {},
            "ok",
            "qwen3_vl, 8.8 billion parameters, 262,144 tokens of context; 8 drawn frames are 144 video",
        ),
        ({}, "ok", "the draft small fits"),
        ({"draft": None, "context": None, "parameters": 1_900_000}, "ok", "1.9 million parameters; 8 drawn"),
        ({"warnings": ["some captions differ"]}, "warn", "some captions differ"),
    ],
)
def test_what_is_said_of_a_checkpoint(change: dict[str, Any], status: str, words: str) -> None:
    with Acted(said(BUILT, LOOKED_AT | change)) as acted:
        acted.devices()
        found = acted.checkpoint()
    assert found.status == status
    assert words in f"{found.detail} {found.fix}"


def test_a_checkpoint_is_looked_at_without_its_weights(tmp_path: Path) -> None:
    target, draft = (demo_folder(name) for name in ("qwen-target", "qwen-draft"))
    found = probe.checkpoint(str(target), str(draft))
    assert (found["family"], found["draft"], found["warnings"]) == ("qwen2_5_vl", str(draft), [])
    assert found["video"] < found["prompt"]
    broken = tmp_path / "broken"
    shutil.copytree(target, broken)
    (broken / "chat_template.jinja").unlink()
    for name, other in (("chat template cannot", None), ("its family is", demo_folder("llava-draft"))):
        with pytest.raises(SpecvlmError, match=name):
            probe.checkpoint(str(broken if other is None else target), other and str(other))


def test_a_draft_alone_is_refused(specvlm: Specvlm) -> None:
    done = specvlm("doctor", "--draft", "small")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "--target" in done.err


# All of it


def test_an_unknown_preset_is_refused(specvlm: Specvlm) -> None:
    done = specvlm("doctor", "--preset", "demmo")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "demo-llava" in done.err


def test_this_machine(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "specvlm_cli", "doctor", tmp_path / "out", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    found = json.loads(done.stdout)
    assert found["schema"] == 1
    assert done.returncode == (0 if found["ok"] else 1)
    assert ",".join(one["name"] for one in found["checks"]).replace(",", " ") == NAMES.replace(",", " ")
    assert all(set(one) == {"name", "status", "detail", "fix", "seconds"} for one in found["checks"])
    status = {one["name"]: one["status"] for one in found["checks"]}
    assert status["generation"] == status["reader pyav"] == status["locks"] == status["ledger"] == "ok", found
    assert all(one["fix"] for one in found["checks"] if one["status"] != "ok")
    assert list(tmp_path.iterdir()) == []


def test_a_line_for_each_finding_with_its_fix(specvlm: Specvlm, monkeypatch: pytest.MonkeyPatch) -> None:
    from specvlm_cli.doctor import examination

    def few(out: Path, probe: object, target: str | None) -> list[Check]:
        looks = (checks.ok("fine"), checks.warn("so \x1b[0m so", "turn it"), checks.fail("broken", "mend it"))
        return [
            Check(f"check {number}", lambda verdict=verdict: verdict) for number, verdict in enumerate(looks)
        ]  # type: ignore[misc]

    monkeypatch.setattr(examination, "_checks", few)
    done = specvlm("doctor")
    assert done.code == 1
    assert done.out.splitlines() == [
        "ok   check 0        fine",
        "warn check 1        so \\x1b[0m so -> turn it",
        "fail check 2        broken -> mend it",
    ]
