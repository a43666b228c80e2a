"""What a page says of one figure over seeds: median, smallest, largest, and a 95% interval of the mean."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# 97.5% quantile of Student's t by degrees of freedom, from 1
_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)
_Z = 1.959964


@dataclass(frozen=True)
class Spread:
    """A figure over seeds.

    Attributes:
        n: how many seeds
        median, low, high: of the seeds' values
        interval: 95% t interval of their mean, cut to the figure's range; none of one seed
    """

    n: int
    median: float
    low: float
    high: float
    interval: tuple[float, float] | None


def spread(values: Sequence[float], bounds: tuple[float, float] = (-math.inf, math.inf)) -> Spread | None:
    """Return the spread of the seeds' values; none where there are none.

    Args:
        bounds: what the figure cannot leave, to which the interval is cut
    """
    if not values:
        return None
    interval = None
    if len(values) > 1:
        mean, half = statistics.fmean(values), t_quantile(len(values) - 1) * _standard_error(values)
        interval = max(bounds[0], mean - half), min(bounds[1], mean + half)
    return Spread(len(values), statistics.median(values), min(values), max(values), interval)


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def t_quantile(freedom: int) -> float:
    """Return the 97.5% quantile of Student's t; beyond the table by its expansion in 1 / freedom, right to 1e-4.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5.
    """
    if freedom <= len(_T):
        return _T[freedom - 1]
    z, n = _Z, float(freedom)
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )


def text(found: Spread | None, digits: int = 3) -> str:
    """Return "median (smallest to largest) [interval]"; one figure alone where all seeds agree, "-" for none."""
    if found is None:
        return "-"

    def number(value: float) -> str:
        return f"{value:.{digits}f}".replace("-0." + "0" * digits, "0." + "0" * digits)

    if found.low == found.high:
        return number(found.median)
    assert found.interval is not None  # values differ, so there are several
    ends = f"[{number(found.interval[0])}, {number(found.interval[1])}]"
    return f"{number(found.median)} ({number(found.low)} to {number(found.high)}) {ends}"
