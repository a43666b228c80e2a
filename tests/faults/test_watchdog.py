"""A process that hangs ends, and shows where."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.faults

SCRIPT = """
import time
from oneshot.distributed.watchdog import alive, watched

def stuck():
    time.sleep(60)

with watched(0.02):
    for _ in range(4):
        time.sleep(0.6)
        alive()
with watched(0):
    alive()
time.sleep(1.5)
print("got here", flush=True)
with watched(0.02):
    stuck()
"""


def test_a_silent_process_ends_with_its_stacks_and_a_busy_one_does_not():
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=50)
    assert ran.stdout == "got here\n"
    assert ran.returncode == 1
    assert "in stuck" in ran.stderr
