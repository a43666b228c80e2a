"""A share of successes with its Wilson interval: no rate is shown without its n."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True)
class Rate:
    """A share of ``n`` probes.

    Attributes:
        value: successes / n, nan where n is 0
        low: lower end of the interval, within [0, 1]
        high: upper end of the interval, within [0, 1]
        n: number of probes
    """

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float | int]:
        """Return ``{value, low, high, n}``, as report.json holds it."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


def wilson(successes: int, n: int, confidence: float = 0.95) -> Rate:
    """Return the rate with its Wilson score interval, which stays honest at 0 and at 1 and for few probes.

    Raises:
        ValueError: successes outside 0..n, or a confidence outside (0, 1)
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: give 0 to n successes.")
    if not 0 < confidence < 1:
        raise ValueError(f"Confidence is {confidence}: give a value between 0 and 1.")
    if n == 0:
        return Rate(value=math.nan, low=0.0, high=1.0, n=0)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / n
    shrink = 1 + z * z / n
    center = (share + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At the ends the formula gives exactly 0 and 1; floating point would leave 1e-18 of the other side.
    low = 0.0 if successes == 0 else max(0.0, center - half)
    high = 1.0 if successes == n else min(1.0, center + half)
    return Rate(value=share, low=low, high=high, n=n)
