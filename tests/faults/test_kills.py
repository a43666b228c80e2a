"""A few kills of every kind that takes seconds; ``make kills`` tries more moments, and launched ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.faults
HERE = Path(__file__).resolve().parent
KINDS = "^repair, merged$|^repair that fails$|^repair on 2 ranks$|^repair of an adapter$|^export|^score"


@pytest.mark.timeout(600)
def test_a_killed_command_leaves_nothing_unsafe_and_can_be_run_again() -> None:
    # a process of its own: it forks for every run, which a process with threads must not
    ran = subprocess.run(
        [sys.executable, str(HERE / "kills.py"), "--count", "9", "--seed", "16", "--only", KINDS],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
