"""A rank that fails ends the run on all ranks, with its own error first; a run that ends well ends with 0."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from harness import ROOT, Ran, launch

pytestmark = pytest.mark.faults
SCRIPT = Path(__file__).parent / "failing.py"
HUNG = 60  # seconds after which a launch is ended and its test fails; the ranks would wait for each other for 300


def errors(ran: Ran) -> list[str]:
    return re.findall(r"^oneshot.*: error: .*$", ran.err, re.MULTILINE)


MISTAKE = ("user-one", "The file is broken here: mend it.")
BUG = ("exception-one", "RuntimeError: the disk is full (--debug shows the traceback)")


@pytest.mark.parametrize(
    ("topology", "rank", "failure", "message"),
    [
        ("ddp", 0, *MISTAKE),
        ("ddp", 1, *BUG),
        ("zero2", 1, *MISTAKE),
        ("zero3", 0, *BUG),
        ("zero3", 1, *MISTAKE),
    ],
)
def test_the_rank_that_fails_is_heard(topology: str, rank: int, failure: str, message: str) -> None:
    ran = launch(topology, SCRIPT, timeout=HUNG, FAILURE=failure, FAILING_RANK=str(rank))
    assert ran.code != 0
    assert errors(ran) == [f"oneshot repair: error: rank {rank}: {message}"]
    assert "Traceback" not in ran.err[: ran.err.index("error:")]
    assert len(re.findall("is here", ran.out)) == 2, "what ranks had printed is lost"


@pytest.mark.parametrize("topology", ["ddp", "zero3"])
def test_a_rank_that_fails_within_a_step_leaves_nobody_waiting(topology: str) -> None:
    ran = launch(topology, SCRIPT, "--debug", timeout=HUNG, FAILURE="in-step", FAILING_RANK="1")
    assert ran.code != 0
    assert errors(ran) == ["oneshot repair: error: rank 1: RuntimeError: out of luck"]
    assert 'raise RuntimeError("out of luck")' in ran.err[: ran.err.index("error: rank 1")], "--debug: no traceback"


def test_a_mistake_that_all_ranks_see_is_said_once() -> None:
    ran = launch("ddp", SCRIPT, timeout=HUNG, FAILURE="user-all")
    assert ran.code != 0
    (said,) = errors(ran)
    assert re.fullmatch(r"oneshot repair: error: rank [01]: The file is missing: give another\.", said)


def test_a_wrong_setting_is_said_once() -> None:
    ran = launch("ddp", ROOT / "oneshot" / "repair.py", "--repair.rank", "0", timeout=HUNG)
    assert ran.code != 0
    said = "Setting repair.rank is 0 (on the command line): give a whole number above 0."
    assert errors(ran) == [f"oneshot repair: error: rank 0: {said}"]


def test_a_missing_model_is_said_once_and_nothing_is_written(tmp_path: Path) -> None:
    arguments = ["--model.path", str(tmp_path / "none"), "--out", str(tmp_path / "run")]
    ran = launch("zero3", ROOT / "oneshot" / "repair.py", *arguments, timeout=HUNG)
    assert ran.code != 0
    (said,) = errors(ran)
    assert f"The model folder {tmp_path / 'none'} does not exist" in said
    assert list(tmp_path.iterdir()) == []


def test_a_killed_rank_ends_the_run() -> None:
    ran = launch("ddp", SCRIPT, timeout=HUNG, FAILURE="killed", FAILING_RANK="1")
    assert ran.code != 0


@pytest.mark.parametrize("topology", ["ddp", "zero2", "zero3"])
def test_a_run_that_ends_well_ends_with_0(topology: str, tmp_path: Path) -> None:
    ran = launch(topology, SCRIPT, timeout=HUNG, FAILURE="none", DONE=str(tmp_path / "rank"))
    assert ran.code == 0, ran.err
    assert sorted((p.name, p.read_text()) for p in tmp_path.iterdir()) == [("rank0", "2.0"), ("rank1", "2.0")]
