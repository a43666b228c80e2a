"""tools/shape.py, and the limits that ruff and import-linter check: bad code is found, and so is a stale exception."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
shape = runpy.run_path(str(ROOT / "tools" / "shape.py"))


@pytest.fixture
def tree(tmp_path):
    """An empty checkout; call it to write a file of it."""
    for folder in shape["FOLDERS"]:
        (tmp_path / folder).mkdir()

    def write(name, text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path

    return write


def function(name, lines, indent=""):
    return "\n".join([f"{indent}def {name}():", *[f"{indent}    pass"] * (lines - 1)]) + "\n"


def test_what_is_short_enough_passes(tree):
    root = tree("oneshot/room/a.py", function("exact", 60) + "x = 1\n" * 240)
    assert shape["too_long"](root) == {}


def test_long_files_and_functions_are_named(tree):
    tree("oneshot/room/a.py", "x = 1\n" * 301)
    tree("benchmarks/b.py", "@decorated\n" + function("plain", 61) + "class C:\n" + function("method", 70, "    "))
    inner = "async def outer():\n" + function("inner", 61, "    ")
    assert shape["too_long"](tree("tools/c.py", inner)) == {
        "oneshot/room/a.py": "oneshot/room/a.py: 301 lines, 300 at most",
        "benchmarks/b.py: plain": "benchmarks/b.py:2: plain has 61 lines, 60 at most",
        "benchmarks/b.py: C.method": "benchmarks/b.py:64: C.method has 70 lines, 60 at most",
        "tools/c.py: outer": "tools/c.py:1: outer has 62 lines, 60 at most",
        "tools/c.py: outer.inner": "tools/c.py:2: outer.inner has 61 lines, 60 at most",
    }


def test_an_exception_holds_while_it_is_needed_and_gives_a_reason():
    found = {"oneshot/a.py": "oneshot/a.py: 301 lines, 300 at most"}
    assert shape["problems"](found, {}) == list(found.values())
    assert shape["problems"](found, {"oneshot/a.py": "a table of words"}) == []
    (unreasoned,) = shape["problems"](found, {"oneshot/a.py": " "})
    assert "oneshot/a.py has no reason" in unreasoned
    (stale,) = shape["problems"]({}, {"oneshot/a.py": "a table of words"})
    assert "oneshot/a.py is no longer too long" in stale


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("def f(a, b, c, d, e, f, *, g, h):\n    return a\n", "PLR0913"),
        ("def f(a, b, c, d, e, f, g):\n    return a\n", None),
        ("class C:\n    def f(self, a, b, c, d, e, f, g):\n        return a\n", None),
        ("def f(x):\n    for a in x:\n        if a:\n            for b in a:\n                while b:\n"
         "                    with b:\n                        b.c()\n", "PLR1702"),
    ],
)  # fmt: skip
def test_ruff_counts_arguments_and_blocks(tmp_path, text, rule):
    (tmp_path / "bad.py").write_text(text)
    command = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    done = subprocess.run([*command, "--output-format", "json", str(tmp_path)], capture_output=True, check=False)
    found = {problem["code"] for problem in json.loads(done.stdout)}
    assert {code for code in found if code.startswith("PLR")} == ({rule} if rule else set())
