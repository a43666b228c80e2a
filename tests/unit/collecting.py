"""Garbage is collected more seldom while tests run. Import ``pytest_collection_finish`` into a tier's conftest."""

import gc

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What was imported stays: each collection would otherwise go through all of torch and transformers again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 10)
