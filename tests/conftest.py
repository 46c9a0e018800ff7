"""Shared set-up: one thread in every process, Ctrl-C as a terminal has it, order, the size of the randomised runs."""

from __future__ import annotations

import gc
import os
import signal
import sys
import tempfile
from collections.abc import Iterator

import pytest

from tests.covering import mark_the_rest

# Tiny tensors are faster on one thread, results do not depend on the number of cores, and pytest-xdist keeps all
# cores busy. Set before torch is imported; processes that tests start inherit it.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}

# Modules are compiled once, and not by each of the hundreds of processes that tests start.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A shell without job control starts what runs in the background with Ctrl-C ignored, and so does `nohup` with SIGHUP.
# Processes that tests start would inherit it.
for _number, _usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _usual)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the long randomised mode: `pytest -m fuzz --fuzz-cases 1000 --fuzz-seed 0`."""
    parser.addoption("--fuzz-cases", type=int, default=200, help="randomised parity cases")
    parser.addoption("--fuzz-seed", type=int, default=0, help="seed of the first case")
    parser.addoption("--fuzz-family", default="", help="of tests.tiny, in all cases; empty: any")


@pytest.hookimpl(wrapper=True)
def pytest_cmdline_main() -> Iterator[None]:
    """Have a folder in which the processes of this run keep what takes long to make."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return (yield)
    with tempfile.TemporaryDirectory(prefix="specvlm-tests-") as folder:
        os.environ["TESTS_SHARED_FOLDER"] = folder
        return (yield)


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_the_rest(items)
    items.sort(key=lambda item: item.get_closest_marker("early") is None)


def pytest_collection_finish() -> None:
    """Leave what imports made, a million objects, out of all garbage collections, and of what forks would copy."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The same where torch was imported before the variables were set."""
    import torch

    torch.set_num_threads(1)
