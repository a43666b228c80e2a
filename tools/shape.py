"""Check that no file and no function has grown too long to be read at one go: ``python tools/shape.py``.

The rest of what CONTRIBUTING.md asks of a shape is checked by ruff (arguments of a function, blocks within blocks) and
by import-linter (modules that import each other in a circle).
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

FOLDERS = ("oneshot", "benchmarks", "tools")
FILE_LINES, FUNCTION_LINES = 300, 60
# "file" or "file: function" -> why it may be longer. What has become short enough must leave this table.
EXCEPTIONS: dict[str, str] = {}


def too_long(root: Path) -> dict[str, str]:
    """Return every file and function that is too long, by its name in ``EXCEPTIONS``, with what is wrong."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            text, name = path.read_text(encoding="utf-8"), path.relative_to(root).as_posix()
            lines = len(text.splitlines())
            if lines > FILE_LINES:
                found[name] = f"{name}: {lines} lines, {FILE_LINES} at most"
            for function, length, line in functions(ast.parse(text, name)):
                if length > FUNCTION_LINES:
                    where = f"{name}:{line}: {function}"
                    found[f"{name}: {function}"] = f"{where} has {length} lines, {FUNCTION_LINES} at most"
    return found


def functions(tree: ast.AST, within: str = "") -> Iterator[tuple[str, int, int]]:
    """Yield (dotted name, lines without decorators, first line) of all functions, methods and inner ones included."""
    for node in ast.iter_child_nodes(tree):
        name = within
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            name = f"{within}.{node.name}".lstrip(".")
            if not isinstance(node, ast.ClassDef):
                yield name, (node.end_lineno or node.lineno) - node.lineno + 1, node.lineno
        yield from functions(node, name)


def problems(found: Mapping[str, str], exceptions: Mapping[str, str]) -> list[str]:
    """Return what is too long and no exception, and the exceptions that are needed no more or give no reason."""
    said = [text for name, text in found.items() if name not in exceptions]
    said += [f"tools/shape.py: {name} is no longer too long: take it out" for name in exceptions if name not in found]
    return said + [f"tools/shape.py: {name} has no reason" for name, reason in exceptions.items() if not reason.strip()]


def main() -> None:
    """Print what is wrong with this checkout, and exit with 1 if anything is."""
    said = problems(too_long(Path(__file__).resolve().parents[1]), EXCEPTIONS)
    print("\n".join(said) or f"No file over {FILE_LINES} lines, no function over {FUNCTION_LINES}.")
    sys.exit(bool(said))


if __name__ == "__main__":
    main()
