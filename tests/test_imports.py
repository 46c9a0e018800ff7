"""What is installed imports nothing that is not, and the library never imports the batch tool."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_INSTALLED = {"recipes", "benchmarks", "tests", "examples"}


def imported(file: Path) -> set[str]:
    """The modules that a file imports, at the top or inside a function."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {
        node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level
    }
    return names


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("specvlm", NOT_INSTALLED | {"specvlm_cli"}),
        ("specvlm_cli", NOT_INSTALLED),
        ("recipes", {"benchmarks", "tests"}),
    ],
)
def test_a_package_imports_only_what_it_may(package: str, forbidden: set[str]) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    found = {
        str(file.relative_to(ROOT)): {name.partition(".")[0] for name in imported(file)} & forbidden
        for file in files
    }
    assert {file: names for file, names in found.items() if names} == {}


def test_the_core_imports_nothing_that_is_built_on_it() -> None:
    core = [*(ROOT / "specvlm").glob("*.py"), *(ROOT / "specvlm" / "drafts").glob("*.py")]
    core += [*(ROOT / "specvlm" / "families").glob("*.py"), *(ROOT / "specvlm" / "video").glob("*.py")]
    built_on_it = ("specvlm.bench", "specvlm.training", "specvlm.inspection")
    found = {file.name: [name for name in imported(file) if name.startswith(built_on_it)] for file in core}
    assert {file: names for file, names in found.items() if names} == {}
    for package, others in {"inspection": ("bench", "training"), "training": ("bench", "inspection")}.items():
        for file in (ROOT / "specvlm" / package).glob("*.py"):
            forbidden = tuple(f"specvlm.{other}" for other in others)
            assert not [name for name in imported(file) if name.startswith(forbidden)], file
