"""300 damaged files: no traceback, no hang, no silently different weights or verdicts (``make fuzz`` tries more)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.faults
HERE = Path(__file__).resolve().parent


@pytest.mark.timeout(600)
def test_damaged_files_are_named_and_nothing_else_happens() -> None:
    # a process of its own: it forks for every try, which a process with threads must not
    ran = subprocess.run(
        [sys.executable, str(HERE / "fuzz.py"), "--count", "300", "--seed", "16"], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
