"""Shared set-up: few threads, and the size of the randomised runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the long randomised mode: `pytest -m fuzz --fuzz-cases 1000 --fuzz-seed 0`."""
    parser.addoption("--fuzz-cases", type=int, default=200, help="randomised parity cases")
    parser.addoption("--fuzz-seed", type=int, default=0, help="seed of the first case")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is measured here is not kept for the user of this machine."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny tensors are faster on one thread, and results do not depend on the machine's cores."""
    torch.set_num_threads(1)
