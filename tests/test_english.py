"""Plain English: turns that readers stumbled over stay out of documents, help, messages, docstrings and comments."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BANNED = {  # turn -> what to write
    r"anew": "again, from scratch",
    r"nobody|no one": "no ..., not ...",
    r"mend(?:s|ed|ing)?": "fix",
    r"by lot": "at random",
    r"in hand": "in progress",
    r"(?:go|goes|went) on": "continue, resume, during",
    r"the very": "the same",
    r"beside": "next to, in addition to, with",
    r"(?:is|are|was|were) told": "is reported, receives, is given",
    r"(?:tells|told)(?! apart)": "says, reports",
    r"stands?(?: (?:in|on|for|behind|beside|there))": "is, is stored, follows",
    r"lends?": "passes",
    r"put together": "merged",
    r"what guesses": "the draft",
    r"came of it": "the result",
    r"likeliest": "most likely",
}
TURNS = re.compile(rf"\b(?:{'|'.join(BANNED)})\b", re.IGNORECASE)
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("tests/**/*.md")])
SOURCES = sorted(
    path
    for folder in ("specvlm", "specvlm_cli", "examples", "recipes")
    for path in (ROOT / folder).rglob("*.py")
)


def prose(source: str) -> Iterator[tuple[int, str]]:
    """Comments, docstrings and messages of a module, with their lines."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert not [
        f"{path}:{number}: {found[0]}"
        for number, line in enumerate(lines, 1)
        if (found := TURNS.search(line))
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sources(path: Path) -> None:
    found = {
        f"{path}:{line}: {' '.join(hit[0].split())}"
        for line, text in prose(path.read_text(encoding="utf-8"))
        for hit in TURNS.finditer(text)
    }
    assert not found


def test_the_list_finds_a_turn() -> None:
    assert TURNS.search("start again to go on")
    assert TURNS.search("A variable that belongs to no flag is told.")
    assert not TURNS.search("besides, the standard outcome can be told apart")
