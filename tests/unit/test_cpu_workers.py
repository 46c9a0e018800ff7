"""How many workers share the CPU, and how many threads each of them has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from specvlm.packaged import demo_folder
from specvlm_cli.caption import engine, gpus
from specvlm_cli.caption.engine import cpu_workers

DEMO = [str(demo_folder("qwen-target")), str(demo_folder("qwen-draft"))]


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve cores, Linux, and no driver of any GPU."""
    monkeypatch.setattr(engine, "usable_cores", lambda: 12)
    monkeypatch.setattr(gpus, "_DRIVERS", ())
    monkeypatch.setattr(gpus.sys, "platform", "linux")


def checkpoint(folder: Path, size: int, name: str = "model.safetensors") -> str:
    folder.mkdir()
    with (folder / name).open("wb") as file:
        file.truncate(size)
    return str(folder)


def test_the_demo_pair_gets_a_worker_for_each_core() -> None:
    assert cpu_workers(DEMO, None) == cpu_workers(DEMO, "cpu") == cpu_workers(DEMO[:1], "auto") == 12


@pytest.mark.parametrize(("target", "draft", "workers"), [(20, 12, 12), (20, 13, 1), (0, 1, 1)])
def test_all_weights_must_fit_into_the_caches(tmp_path: Path, target: int, draft: int, workers: int) -> None:
    models = [checkpoint(tmp_path / "target", target << 20), checkpoint(tmp_path / "draft", draft << 20)]
    assert cpu_workers(models, "cpu") == workers


def test_shards_and_older_files_count(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "target", 20 << 20, "model-00001-of-00002.safetensors")
    assert cpu_workers([folder], "cpu") == 12
    (tmp_path / "target" / "pytorch_model.bin").write_bytes(bytes(13 << 20))
    assert cpu_workers([folder], "cpu") == 1


def test_what_is_not_on_this_machine_may_be_large() -> None:
    assert cpu_workers(["Qwen/Qwen2.5-VL-7B-Instruct", DEMO[1]], "cpu") == 1


def test_a_gpu_is_never_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu_workers(DEMO, "cuda") == cpu_workers(DEMO, "cuda:1") == cpu_workers(DEMO, "mps") == 1
    monkeypatch.setattr(gpus, "_DRIVERS", (tmp_path / "none", tmp_path))
    assert cpu_workers(DEMO, None) == cpu_workers(DEMO, "auto") == 1
    assert cpu_workers(DEMO, "cpu") == 12


@pytest.mark.parametrize(
    ("workers", "readers", "threads"), [(12, 6, 1), (4, 6, 3), (1, 2, 11), (1, 8, 8), (1, 40, 1)]
)
def test_workers_divide_the_cores_and_a_single_one_leaves_some_to_the_readers(
    monkeypatch: pytest.MonkeyPatch, workers: int, readers: int, threads: int
) -> None:
    asked: list[int] = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    factory = engine.Factory(None, quiet=True, readers=readers)  # type: ignore[arg-type]
    factory._share_cores(workers)
    assert asked == [threads]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    factory._share_cores(workers)
    assert asked == [threads]
