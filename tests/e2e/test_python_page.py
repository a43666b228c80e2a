"""Every snippet of docs/python.md, run as it stands, one after the other in one process and an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e
PAGE = Path(__file__).parents[2] / "docs" / "python.md"


def test_the_snippets_run(tmp_path: Path) -> None:
    snippets = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(snippets) >= 6
    script = tmp_path / "page.py"
    script.write_text("\n".join(f"print('== {n}', flush=True)\n{text}" for n, text in enumerate(snippets)))
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    parts = dict(re.findall(r"^== (\d+)\n(.*?)(?=^== |\Z)", done.stdout, re.MULTILINE | re.DOTALL))
    assert len(parts) == len(snippets)
    assert re.search(r"^finetuned: attack success [01]\.\d\d \[", parts["0"], re.MULTILINE)
    assert "Setting repair.rank is 'many': give a whole number above 0." in done.stdout
    assert re.search(r"^repaired: attack success 0\.\d\d \[", parts["0"], re.MULTILINE)
    assert "checkpoint runs/merged" in done.stdout
    assert not re.search("usage:|Traceback", done.stdout + done.stderr)
    assert {path.name for path in (tmp_path / "runs").iterdir()} >= {"first", "second", "scored", "damaged", "merged"}
