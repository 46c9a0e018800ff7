"""What is installed imports nothing that is not, and the library never imports the batch tool."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_INSTALLED = {"recipes", "benchmarks", "tests", "examples"}


def imported_packages(file: Path) -> set[str]:
    """The top-level packages that a file imports, at the top or inside a function."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {
        node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level
    }
    return {name.partition(".")[0] for name in names}


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
    found = {str(file.relative_to(ROOT)): imported_packages(file) & forbidden for file in files}
    assert {file: names for file, names in found.items() if names} == {}
