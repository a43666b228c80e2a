"""Tests that need an NVIDIA GPU; without one each is skipped, and says so."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="oneshot-cache-")  # the user's own is left alone


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = pytest.mark.skip(reason="needs an NVIDIA GPU that torch can use: torch.cuda.is_available() is false")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(missing)
