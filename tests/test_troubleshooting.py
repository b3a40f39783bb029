"""docs/troubleshooting.md quotes what the program says."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from helpers import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py"), *ROOT.glob("smallgpt/**/*.py")]


def texts(source: Path) -> Iterator[str]:
    """All texts in a source, with … where a value is put in: "there is no file …; …"."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = [v.value if isinstance(v, ast.Constant) else "…" for v in node.values]
            yield "".join(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_every_message_on_the_page_is_one_of_the_program():
    """A message was reworded, and whoever searches the page for it finds nothing."""
    page = PAGE.read_text(encoding="utf-8")
    quoted = re.findall(r"`error: ([^`]+)`", page)
    assert len(quoted) > 50
    said = [text for source in SOURCES for text in texts(source)]
    for message in quoted:
        pattern = re.compile(re.escape(message).replace("…", ".*"))
        assert any(map(pattern.search, said)), message


def test_every_message_stands_beside_a_cause_and_a_remedy():
    """A row lacks a cell, and the table shows the remedy as the cause."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    for row in (line for line in lines if line.startswith("| ")):
        cells = [cell.strip() for cell in row.removesuffix("|").split("| ")]
        assert len(cells) == 4, row  # the first is before the table
        assert cells[1] and cells[3], row
