"""A share with its Wilson interval, a mean with its bootstrap interval: no figure is shown without its n."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

_RESAMPLES = 2000
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Rate:
    """A share of ``n`` probes, or a figure that is measured on them.

    Attributes:
        value: successes / n, nan where n is 0
        low: lower end of the interval, of a share within [0, 1]
        high: upper end of the interval, of a share within [0, 1]
        n: number of probes
    """

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float | int]:
        """Return ``{value, low, high, n}``, as report.json holds it."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


def wilson(successes: int, n: int) -> Rate:
    """Return the rate with its Wilson score interval, which stays honest at 0 and at 1 and for few probes.

    Raises:
        ValueError: successes outside 0..n
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: give 0 to n successes.")
    if n == 0:
        return Rate(value=math.nan, low=0.0, high=1.0, n=0)
    z = NormalDist().inv_cdf(0.5 + _CONFIDENCE / 2)
    share = successes / n
    shrink = 1 + z * z / n
    center = (share + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At the ends the formula gives exactly 0 and 1; floating point would leave 1e-18 of the other side.
    low = 0.0 if successes == 0 else max(0.0, center - half)
    high = 1.0 if successes == n else min(1.0, center + half)
    return Rate(value=share, low=low, high=high, n=n)


def mean_rate(values: Sequence[float]) -> Rate:
    """Return the mean of values with its bootstrap interval; see ``ratio_rate``."""
    return ratio_rate(values, [1.0] * len(values))


def ratio_rate(sums: Sequence[float], weights: Sequence[float], *, of: Callable[[float], float] = float) -> Rate:
    """Return sum(sums) / sum(weights) with the bootstrap interval of resampling whole items, as tokens of one text go
    together.

    The percentile interval of 2,000 resamples, drawn alike in every run (Efron and Tibshirani, 1993, chapter 13). With
    few or very skewed items it covers less than it says.

    Args:
        sums: of each item, such as the loss of a text
        weights: of each item, such as its tokens
        of: increasing function of the ratio that is given instead of it, such as exp for a perplexity

    Returns:
        value, low and high after ``of``; n items; nan and an endless interval where there are none
    """
    import numpy as np

    if not len(sums) or not sum(weights) > 0:
        return Rate(value=math.nan, low=-math.inf, high=math.inf, n=0)
    top, bottom = np.asarray(sums, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    picks = np.random.default_rng(0).integers(0, len(top), size=(_RESAMPLES, len(top)))
    drawn = bottom[picks].sum(axis=1)
    ratios = top[picks].sum(axis=1)[drawn > 0] / drawn[drawn > 0]
    tail = (1 - _CONFIDENCE) / 2
    low, high = (float(end) for end in np.quantile(ratios, [tail, 1 - tail]))
    return Rate(value=of(float(top.sum() / bottom.sum())), low=of(low), high=of(high), n=len(top))
