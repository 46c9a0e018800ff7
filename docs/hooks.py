"""Parts of the site that are made from the code and from README.md when it is built."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./|examples|CONTRIBUTING)[^)]*\)")  # files of the repository


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in the first page and the flags; what is not part of the site is named without a link."""
    if page.file.src_uri == "index.md":
        markdown = re.sub(r"\]\(docs/", "](", (ROOT / "README.md").read_text(encoding="utf-8"))
    if page.file.src_uri == "flags.md":
        markdown = markdown.replace("<!-- flags -->", _flags())
    return OUTSIDE.sub(r"\1", markdown)


def _flags() -> str:
    import typer.main

    from specvlm_cli import app
    from specvlm_cli.commands.help import page_of

    group: Any = typer.main.get_command(app.app)
    return "\n\n".join(
        f"## specvlm {name}\n\n```text\n{page_of(group, name)}\n```" for name in group.commands
    )
