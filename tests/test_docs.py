"""The documents say what is true: commands, flags, links, versions, names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer.main

import specvlm
from specvlm_cli import app
from specvlm_cli.exits import ExitCode
from specvlm_cli.run.parts import CAPTION_SCHEMA

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def commands() -> dict[str, set[str]]:
    """Return each command with all spellings of its flags."""
    group: Any = typer.main.get_command(app.app)
    return {
        name: {spelling for one in command.params for spelling in (*one.opts, *one.secondary_opts)}
        | {"--help", "-h"}
        for name, command in group.commands.items()
    }


def code_of(document: Path) -> str:
    """Return everything in a document that stands as code."""
    text = document.read_text()
    blocks = re.findall(r"^(?: {4}.*|```[\s\S]*?^```)$", text, re.MULTILINE)
    return "\n".join([*blocks, *re.findall(r"`[^`\n]+`", text)])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_and_flag_in_the_documents_exists(document: Path) -> None:
    known = commands()
    for line in code_of(document).splitlines():
        for call in re.findall(r"(?:^|[\s/`])specvlm ([a-z]+)(?=[\s`]|$)([^|&`]*)", line):
            name, rest = call
            assert name in known, line
            own, _, inner = rest.partition(" -- caption")  # as behind `specvlm slurm OUT`
            for command, words in ((name, own), ("caption", inner)):
                flags = set(re.findall(r"(?<![\w-])(--?[a-z][a-z-]*)", words))
                assert flags <= known[command], line


def test_every_flag_is_documented_with_its_meaning() -> None:
    table = (ROOT / "docs" / "caption.md").read_text()
    rows = "\n".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `-"))
    documented = set(re.findall(r"(?<![\w-])(--?[a-z][a-z-]*)", rows))
    assert documented == commands()["caption"] - {"inputs", "-h"}


def test_every_choice_of_a_flag_is_documented() -> None:
    group: Any = typer.main.get_command(app.app)
    command = group.commands["caption"]
    context = typer.Context(command)
    lines = (ROOT / "docs" / "caption.md").read_text().splitlines()
    for flag in command.params:
        row = next((line for line in lines if line.startswith("| `-") and f"`{flag.opts[0]}`" in line), "")
        choices = flag.display_type(context).strip("<>").split("|") if not flag.metavar else []
        missing = [one for one in choices if len(choices) > 1 and f"`{one}`" not in row]
        assert not missing, f"docs/caption.md: the row of {flag.opts[0]} lacks {', '.join(missing)}"


def test_every_exit_code_is_documented() -> None:
    table = (ROOT / "docs" / "caption.md").read_text()
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)} == {
        int(one) for one in ExitCode
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if not target.startswith(("https://", "#")):
            assert (document.parent / target.partition("#")[0]).exists(), target


def test_architecture_maps_every_module() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    for package in ("specvlm", "specvlm_cli"):
        for path in (ROOT / package).iterdir():
            private = path.name.startswith(("_", "py.typed")) and path.name != "__init__.py"
            if not private and path.suffix in (".py", ""):
                assert f"{path.name}" in text, f"{package}/{path.name} is missing from docs/architecture.md"


def test_changelog_begins_with_the_version_of_the_package() -> None:
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == specvlm.__version__


def test_public_names_are_sorted_and_there() -> None:
    assert specvlm.__all__ == sorted(specvlm.__all__)
    assert all(getattr(specvlm, name) is not None for name in specvlm.__all__)


def test_what_the_documents_make_is_in_the_makefile() -> None:
    lines = re.findall(r"^([a-z -]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = {name for line in lines for name in line.split()}
    for name in ("README.md", "CONTRIBUTING.md"):
        asked = set(re.findall(r"(?:^ {4}|`)make ([a-z-]+)", (ROOT / name).read_text(), re.MULTILINE))
        assert asked
        assert asked <= targets, name


def test_the_chart_is_drawn_from_the_table() -> None:
    heights = re.findall(r">([0-9.]+)x<", (ROOT / "docs/images/batches.svg").read_text())
    table = (ROOT / "docs" / "benchmarks.md").read_text()
    lines = re.findall(
        r"^\| specvlm 0.9 (?:auto|chain 6), qwen-draft \| x stock \| (.+) \|$", table, re.MULTILINE
    )
    ours = [[float(cell.split()[0]) for cell in line.split(" | ")] for line in lines]
    assert heights == [f"{max(column):.1f}" for column in zip(*ours, strict=True)]


def test_every_column_is_documented() -> None:
    text = (ROOT / "docs" / "columns.md").read_text()
    rows = "\n".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| `"))
    assert re.findall(r"`([a-z0-9_]+)`", rows) == [*dict.fromkeys(re.findall(r"`([a-z0-9_]+)`", rows))]
    assert set(re.findall(r"`([a-z0-9_]+)`", rows)) == set(CAPTION_SCHEMA.names)
