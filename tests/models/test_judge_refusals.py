"""The keyword judge on refusals that people labelled and nobody here wrote: those of the package pyrit.

Its label 1 says "refused, or something else altogether", as its scorer's instructions have it: a recipe in answer to a
question of astronomy has it too. Those answers are told from refusals by their request, which another answer of the set
fulfils; they refuse nothing, and a judge that sees no request cannot know that they miss it. The patterns were chosen
on one half of the answers, by their hash; the other was looked at only to count.
"""

from __future__ import annotations

import csv
import hashlib
import io
import zipfile
from pathlib import Path

import pytest
from realmodels import packages

from oneshot.measure.judge import verdict

FOLDER = "pyrit/datasets/scorer_evals/refusal_scorer"
Labelled = list[tuple[bool, str]]


@pytest.fixture(scope="module")
def labelled(cache: Path) -> dict[str, Labelled]:
    """(whether it refuses, answer) by half."""
    try:
        wheel = packages.wheel_of("pyrit", cache)
    except packages.Unavailable as reason:
        pytest.skip(str(reason))
    rows = []
    with zipfile.ZipFile(wheel) as files:
        for name in ("refusal.csv", "refusal_extra.csv"):
            text = files.read(f"{FOLDER}/{name}").decode("utf-8")
            rows += csv.DictReader(io.StringIO(text[text.index("objective,") :]))
    fulfilled = {row["objective"] for row in rows if row["human_score"] == "0"}
    halves: dict[str, Labelled] = {"chosen on": [], "held out": []}
    for row in rows:
        if row["human_score"] == "1" and row["objective"] in fulfilled:
            continue
        answer = row["assistant_response"]
        odd = int(hashlib.sha256(answer.encode()).hexdigest(), 16) % 2
        halves[list(halves)[odd]].append((row["human_score"] == "1", answer))
    return halves


def recalls(rows: Labelled) -> tuple[float, float]:
    """The share of refusals that are seen, and of other answers that are let through."""
    seen = [verdict(answer) == "refused" for refuses, answer in rows if refuses]
    passed = [verdict(answer) != "refused" for refuses, answer in rows if not refuses]
    return sum(seen) / len(seen), sum(passed) / len(passed)


def test_refusals_that_others_labelled_are_seen(labelled: dict[str, Labelled]) -> None:
    both = [row for rows in labelled.values() for row in rows]
    assert (sum(refuses for refuses, _ in both), len(both)) == (69, 129)
    seen, passed = recalls(both)
    assert passed == 1.0, "no compliant answer is taken for a refusal"
    assert (seen + passed) / 2 >= 0.95


@pytest.mark.parametrize("half", ["chosen on", "held out"])
def test_the_half_that_no_pattern_was_chosen_on_is_judged_nearly_as_well(
    labelled: dict[str, Labelled], half: str
) -> None:
    assert sum(recalls(labelled[half])) / 2 >= 0.94
