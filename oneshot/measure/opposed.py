"""Where two judges move in opposite directions between stages: then no one figure says what happened."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations
from typing import Any

from oneshot.measure.judges import KEYWORDS
from oneshot.measure.rates import JUDGED

Rates = Mapping[str, Mapping[str, Any]]

SPOKEN = {"asr": "attack success", "over_refusal": "over-refusal", "lookalike_refusal": "look-alike refusal"}
_MEAN = "_mean"


def opposed(stages: Mapping[str, Rates]) -> list[str]:
    """Return a sentence for each two stages and measure where one judge's rate rises and another's falls.

    Any rise against any fall counts; a move that stays within the 95% interval of the rate before is marked as such. A
    rubric's mean rating is one more judge of attack success: it may rise while the share of the worst answers falls.

    Args:
        stages: stage -> name of a rate (asr, asr_by_<judge>, <judge>_mean, ...) -> {value, low, high, n}, as
            report.json has them; or the last stages of several runs, by the runs' names
    """
    sentences = []
    for (first, before), (second, after) in combinations(stages.items(), 2):
        for measure in (name for name, _ in JUDGED.values()):
            moves = {}
            for judge, name in _judges(measure, before).items():
                old, new = value_of(before, name), value_of(after, name)
                if old is not None and new is not None and abs(new - old) > 1e-9:
                    moves[judge] = (old, new, _within(before[name], new))
            if len({new > old for old, new, _ in moves.values()}) == 2:
                said = ", ".join(_said(judge, *move) for judge, move in moves.items())
                sentences.append(
                    f"From {first} to {second} the judges of {SPOKEN[measure]} move in opposite directions: {said}."
                )
    return sentences


def opposed_in(report: Mapping[str, Any]) -> list[str]:
    """Return ``opposed`` of what report.json holds, rates and further figures."""
    figures = report.get("figures") or {}
    return opposed({stage: {**rates, **figures.get(stage, {})} for stage, rates in report["stages"].items()})


def rates_by_others(measure: str, rates: Rates) -> list[str]:
    """Return the names of a measure's rates by other judges; those of groups (``asr_by_rubric_seen``) are none."""
    by_others = [name for name in rates if name.startswith(f"{measure}_by_")]
    return [one for one in by_others if not any(one.startswith(f"{other}_") for other in by_others)]


def _judges(measure: str, rates: Rates) -> dict[str, str]:
    """Judge -> name of its rate of the measure."""
    found = {KEYWORDS: measure} | {
        name.removeprefix(f"{measure}_by_"): name for name in rates_by_others(measure, rates)
    }
    if measure == "asr":
        found |= {f"{judge} (mean rating)": judge + _MEAN for judge in list(found) if judge + _MEAN in rates}
    return found


def _said(judge: str, old: float, new: float, within: bool) -> str:
    return f"{judge} {old:.3g} → {new:.3g}{' (within its interval)' if within else ''}"


def _within(rate: Mapping[str, Any], value: float) -> bool:
    low, high = rate.get("low"), rate.get("high")  # JSON has no infinities: null stands for one
    return (low is None or low <= value) and (high is None or value <= high)


def value_of(rates: Rates, name: str) -> float | None:
    """Return a rate's value; none where nothing was measured."""
    value = rates.get(name, {}).get("value")
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None
