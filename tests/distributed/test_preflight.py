"""Before a run on several machines: what is wrong is found, and its machine named, on every rank alike."""

from __future__ import annotations

from pathlib import Path

import preflight_jobs as jobs
import pytest
from ranks import start_ranks

pytestmark = pytest.mark.distributed
CULPRITS = {
    "code": r"rank 1 on machine1 has code other",
    "clock": r"the clock of machine",
    "folder": r"cannot be written.*rank 1 on machine1",
    "not shared": r"does not show what rank [01] on machine[01] wrote there",
    "disk": r"0\.0 GB free on machine1",
    "network": r"rank 1 on machine1 got a wrong sum",
}


def test_a_good_place_passes_and_keeps_no_files(tmp_path: Path) -> None:
    found = start_ranks(jobs.look, 2, "ddp", tmp_path / "ranks", {"folder": str(tmp_path), "wrong": ""}).results()
    for every in found:
        assert every["names"] == ["software", "clocks", "shared folder", "free disk", "all-reduce"]
        assert every["said"] == ""
        assert every["seconds"] < 20
    assert [path.name for path in tmp_path.iterdir()] == ["ranks"]


@pytest.mark.parametrize("wrong", CULPRITS)
def test_the_culprit_is_named_on_every_rank(wrong: str, tmp_path: Path) -> None:
    import re

    (tmp_path / "shared").mkdir()
    arguments = {"folder": str(tmp_path / "shared"), "wrong": wrong}
    said = {every["said"] for every in start_ranks(jobs.look, 2, "ddp", tmp_path / "ranks", arguments).results()}
    assert len(said) == 1
    assert re.search(CULPRITS[wrong], said.pop())
