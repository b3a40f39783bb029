"""Tokens per line of code, file by file: how packed the code is.

    python bench/density.py                       every script and smallgpt/
    python bench/density.py model.py ../nanoGPT   other files and folders

Docstrings, comments and blank lines are left out. nanoGPT has 9.0, nanochat 8.2, lingua 6.8,
torchtitan 5.6.
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def docstring_lines(source: str) -> set[int]:
    """The lines that docstrings, or strings that stand alone, take up."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                lines.update(range(node.lineno, node.end_lineno + 1))
    return lines


def count(path: Path) -> tuple[int, int]:
    """(tokens, lines of code) of a file."""
    source = path.read_text(encoding="utf-8")
    skipped = docstring_lines(source)
    tokens = 0
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in LAYOUT or token.start[0] in skipped:
            continue
        tokens += 1
        lines.update(range(token.start[0], token.end[0] + 1))
    return tokens, len(lines)


def project_files() -> list[Path]:
    """The scripts and the parts, without tests and measurements."""
    folders = (
        ROOT.glob("*.py"),
        (ROOT / "scripts").glob("*.py"),
        (ROOT / "smallgpt").rglob("*.py"),
    )
    return [path for folder in folders for path in sorted(folder)]


def main() -> None:
    named = [Path(word) for word in sys.argv[1:]]
    files = []
    for path in named:
        files += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    total_tokens = total_lines = 0
    for path in files or project_files():
        tokens, lines = count(path)
        total_tokens += tokens
        total_lines += lines
        if lines:
            print(f"{tokens / lines:5.1f}  {lines:5,}  {path}")
    print(f"{total_tokens / total_lines:5.1f}  {total_lines:5,}  all")


if __name__ == "__main__":
    main()
