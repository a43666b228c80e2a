import math

import pytest
from scipy.stats import binomtest

from oneshot.measure.intervals import wilson


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 40), (1, 40), (17, 40), (40, 40), (3, 1000)])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_wilson_agrees_with_scipy(successes, n, confidence):
    rate = wilson(successes, n, confidence)
    theirs = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert rate.value == successes / n
    assert rate.n == n
    assert (rate.low, rate.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_ends_are_exact():
    assert wilson(0, 7).low == 0.0
    assert wilson(7, 7).high == 1.0


def test_no_probes_say_nothing():
    rate = wilson(0, 0)
    assert math.isnan(rate.value)
    assert (rate.low, rate.high, rate.n) == (0.0, 1.0, 0)


def test_as_dict_holds_what_report_json_holds():
    rate = wilson(1, 4)
    assert rate.as_dict() == {"value": 0.25, "low": rate.low, "high": rate.high, "n": 4}


@pytest.mark.parametrize(("successes", "n"), [(-1, 4), (5, 4), (1, 0)])
def test_impossible_counts_are_refused(successes, n):
    with pytest.raises(ValueError, match="0 to n"):
        wilson(successes, n)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95])
def test_impossible_confidence_is_refused(confidence):
    with pytest.raises(ValueError, match="between 0 and 1"):
        wilson(1, 4, confidence)
