import math

import numpy as np
import pytest
from scipy.stats import binomtest

from oneshot.measure.intervals import mean_rate, ratio_rate, wilson


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 40), (1, 40), (17, 40), (40, 40), (3, 1000)])
def test_wilson_agrees_with_scipy(successes, n):
    rate = wilson(successes, n)
    theirs = binomtest(successes, n).proportion_ci(0.95, method="wilson")
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


@pytest.mark.parametrize("n", [10, 40, 200])
def test_wilson_covers_by_simulation_what_it_says(n):
    """Of intervals from simulated models, on average 95% hold the true rate, and nowhere far fewer."""
    rng = np.random.default_rng(n)
    covers = []
    for true in np.linspace(0.02, 0.98, 25):
        drawn = rng.binomial(n, true, size=2000)
        intervals = {k: wilson(int(k), n) for k in set(drawn.tolist())}
        covers.append(np.mean([intervals[k].low <= true <= intervals[k].high for k in drawn.tolist()]))
    assert 0.94 <= np.mean(covers) <= 0.97
    assert min(covers) >= 0.82  # known to dip near the ends: Brown, Cai and DasGupta (2001), figure 5


@pytest.mark.parametrize(("draw", "true"), [("uniform", 0.5), ("exponential", 1.0)])
def test_the_bootstrap_covers_about_what_it_says(draw, true):
    rng = np.random.default_rng(1)
    covers = [found.low <= true <= found.high for found in (mean_rate(getattr(rng, draw)(size=60)) for _ in range(300))]
    assert 0.90 <= np.mean(covers) <= 0.985


def test_the_bootstrap_agrees_with_scipy():
    from scipy.stats import bootstrap

    values = np.random.default_rng(3).normal(5, 2, size=80)
    theirs = bootstrap((values,), np.mean, method="percentile", n_resamples=5000, rng=0).confidence_interval
    ours = mean_rate(values)
    assert ours.value == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.05)


def test_a_ratio_weighs_items_by_their_size_and_keeps_them_whole():
    found = ratio_rate([2.0, 30.0], [1.0, 10.0], of=lambda x: 2 * x)
    assert found.value == pytest.approx(2 * 32 / 11)
    assert (found.low, found.high) == pytest.approx((4.0, 6.0))
    assert found.n == 2
    assert ratio_rate([2.0, 30.0], [1.0, 10.0]) == ratio_rate([2.0, 30.0], [1.0, 10.0])


def test_nothing_measured_has_no_mean():
    found = mean_rate([])
    assert math.isnan(found.value)
    assert (found.low, found.high, found.n) == (-math.inf, math.inf, 0)
