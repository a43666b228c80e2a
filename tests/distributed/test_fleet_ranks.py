"""A fleet on several ranks: what fails on one of them fails on all, so that they go on alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import repair_jobs as jobs
from ranks import start_ranks

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("where", ["epoch", "report"])
def test_what_fails_on_rank_0_alone_fails_on_all_and_the_next_goes_on_alike(where: str, tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / "adapters" / name).mkdir(parents=True)
        (tmp_path / "adapters" / name / "adapter_config.json").write_text("{}")
    given = {"adapters": str(tmp_path / "adapters"), "where": where}
    one, other = start_ranks(jobs.fails_on_rank_0, 2, "ddp", tmp_path / "ranks", given).results(60)
    assert one == other
    assert one["seen"] == [["a", None], ["b", None], ["c", "bilevel, for b"]]
    assert one["rows"] == ["The disk is full", "", ""]
    assert "1 of 3 adapters were not repaired" in one["problem"]
