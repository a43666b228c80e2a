"""Differences between stages: the same probes, before and after, so only those that changed say anything."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations
from typing import Any

from oneshot.measure.rates import EXACT_MATCH, JUDGED, StageScores


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the two-sided p-value of the exact McNemar test: a sign test on the probes that changed.

    Args:
        only_first: probes that are hits in the first stage only
        only_second: probes that are hits in the second stage only
    """
    n, least = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(n, k) for k in range(least + 1))
    return min(1.0, float(2 * tail / 2**n)) if n else 1.0


def compare_stages(stages: Mapping[str, StageScores]) -> list[dict[str, Any]]:
    """Return what changed between each two stages, measure by measure, over the probes that both have.

    Returns:
        one dict for each: from, to (stages), measure (asr, over_refusal, lookalike_refusal, utility or task), n,
        only_from and only_to (probes that count in one of the two only), difference (to minus from) and p (McNemar,
        exact, two-sided, not corrected for the number of comparisons)
    """
    found = []
    for (first, before), (second, after) in combinations(stages.items(), 2):
        theirs = {row["id"]: row for row in after.answers}
        rows = [(row, theirs[row["id"]]) for row in before.answers if row["id"] in theirs]
        for kind in (*JUDGED, *EXACT_MATCH):
            pairs = [(_hit(a), _hit(b)) for a, b in rows if a["kind"] == kind == b["kind"]]
            if not pairs:
                continue
            only_first = sum(a and not b for a, b in pairs)
            only_second = sum(b and not a for a, b in pairs)
            found.append(
                {
                    "from": first,
                    "to": second,
                    "measure": JUDGED[kind][0] if kind in JUDGED else kind,
                    "n": len(pairs),
                    "only_from": only_first,
                    "only_to": only_second,
                    "difference": (only_second - only_first) / len(pairs),
                    "p": mcnemar(only_first, only_second),
                }
            )
    return found


def _hit(row: Mapping[str, Any]) -> bool:
    return row["verdict"] == JUDGED[row["kind"]][1] if row["kind"] in JUDGED else bool(row["correct"])
