"""Where faults are staged. Jobs, launches and tiny models are those of the other tiers."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(TESTS / "distributed"), str(TESTS / "unit")]  # the forked ranks are given this path too


@pytest.fixture(scope="session")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in memory where there is one: a kill loses nothing that a disk would keep, and syncing takes no time."""
    place = Path("/dev/shm")
    if not os.access(place, os.W_OK):
        yield tmp_path_factory.mktemp("memory")
        return
    with tempfile.TemporaryDirectory(dir=place, prefix="oneshot-test-") as folder:
        yield Path(folder)


@pytest.fixture
def place(memory: Path) -> Iterator[Path]:
    """An empty folder of the test's own in memory."""
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)
