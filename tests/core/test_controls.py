"""Bootstrap intervals: scipy as the oracle, coverage on drawn data; and every control names bad input."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from interp.core.controls import (
    benjamini_hochberg,
    bootstrap_interval,
    holm,
    permutation_test,
    rank_test,
    set_rank_test,
)
from interp.core.errors import InterpError

RNG = np.random.default_rng


def test_interval_agrees_with_scipy() -> None:
    ties = np.repeat([0.0, 1.0], [13, 7])
    skewed = [RNG(1).exponential(size=25), RNG(2).lognormal(0, 1, 60)]
    for seed, draw in enumerate([RNG(0).normal(3, 1, 40), *skewed, ties]):
        ours = bootstrap_interval(draw, n_resamples=20_000, seed=seed)
        theirs = stats.bootstrap((draw,), np.mean, n_resamples=20_000, method="BCa", rng=RNG(9)).confidence_interval
        width = theirs.high - theirs.low
        assert ours.estimate == pytest.approx(draw.mean())
        assert abs(ours.low - theirs.low) < 0.03 * width
        assert abs(ours.high - theirs.high) < 0.03 * width


def test_interval_follows_shift_and_scale_with_ties_that_rounding_splits() -> None:
    x = np.repeat([0.0, 1.0], [13, 7])
    plain, moved = bootstrap_interval(x, seed=3), bootstrap_interval(0.1 + 0.2 * x, seed=3)
    assert [moved.low, moved.high] == pytest.approx([0.1 + 0.2 * plain.low, 0.1 + 0.2 * plain.high])


def test_interval_of_a_callable_equals_the_named_statistic() -> None:
    x = RNG(3).gamma(2.0, size=30)
    named = bootstrap_interval(x, statistic="mean", seed=4)
    called = bootstrap_interval(x, statistic=lambda a, axis: a.mean(axis), seed=4)
    assert called.low == pytest.approx(named.low)
    assert called.high == pytest.approx(named.high)
    median = bootstrap_interval(x, statistic="median", seed=4)
    assert median.low < np.median(x) < median.high


def test_grouped_jackknife_keeps_the_acceleration() -> None:
    """Above 500 values deletions are grouped; the ends must stay those of the closed form of the mean."""
    x = RNG(5).lognormal(0, 1, 1500)
    exact = bootstrap_interval(x, seed=6)
    grouped = bootstrap_interval(x, statistic=lambda a, axis: a.mean(axis), seed=6)
    width = exact.high - exact.low
    assert abs(exact.low - grouped.low) < 0.02 * width
    assert abs(exact.high - grouped.high) < 0.02 * width


def test_interval_blocks_do_not_change_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    x = RNG(7).normal(size=50)
    whole = bootstrap_interval(x, n_resamples=500)
    monkeypatch.setattr("interp.core.controls.BLOCK", 700)
    assert bootstrap_interval(x, n_resamples=500) == whole


def test_interval_coverage() -> None:
    """Coverage of 95 % intervals: close for normal values, and on skewed ones better than the percentile interval's."""
    trials, n = 600, 25
    normal = exponential = percentile = 0
    for trial in range(trials):
        rng = RNG(trial)
        interval = bootstrap_interval(rng.normal(1.0, 2.0, n), n_resamples=600, seed=trial)
        normal += interval.low <= 1.0 <= interval.high
        skewed = rng.exponential(size=n)
        interval = bootstrap_interval(skewed, n_resamples=600, seed=trial)
        exponential += interval.low <= 1.0 <= interval.high
        low, high = np.quantile(skewed[rng.integers(n, size=(600, n))].mean(1), [0.025, 0.975])
        percentile += low <= 1.0 <= high
    assert 0.91 <= normal / trials <= 0.97
    assert exponential / trials >= 0.89
    assert exponential >= percentile


def test_interval_narrows_with_the_root_of_n() -> None:
    widths = [np.ptp([(i := bootstrap_interval(RNG(8).normal(size=n), seed=1)).low, i.high]) for n in (100, 1600)]
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.25)


def test_interval_of_equal_values_is_a_point() -> None:
    interval = bootstrap_interval(np.full(6, 2.5))
    assert (interval.estimate, interval.low, interval.high) == (2.5, 2.5, 2.5)


def test_interval_of_two_values_stays_between_them() -> None:
    interval = bootstrap_interval([1.0, 3.0])
    assert 1.0 <= interval.low <= interval.estimate <= interval.high <= 3.0


def test_interval_takes_tensors_of_any_precision() -> None:
    x = torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0])
    assert bootstrap_interval(x.bfloat16()) == bootstrap_interval(x.double().numpy())


# Bad input

NAN = float("nan")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: bootstrap_interval([1.0]), "at least 2"),
        (lambda: bootstrap_interval([]), "at least 2"),
        (lambda: bootstrap_interval([1.0, NAN, 2.0]), "1 NaN or infinite of 3"),
        (lambda: bootstrap_interval(torch.tensor([1.0, float("inf")])), "NaN or infinite"),
        (lambda: bootstrap_interval(np.zeros((2, 3))), r"shape \(2, 3\)"),
        (lambda: bootstrap_interval([1.0, 2.0], level=95), "level=95"),
        (lambda: bootstrap_interval([1.0, 2.0], n_resamples=10), "n_resamples=10"),
        (lambda: bootstrap_interval([1.0, 2.0], statistic=lambda a, axis: a.mean(axis) / 0 * 0), "not finite"),
        (lambda: permutation_test([], [1.0]), "first group"),
        (lambda: permutation_test([1.0], [NAN]), "second group"),
        (lambda: permutation_test([1.0, 2.0], [1.0], paired=True), "2 and 1"),
        (lambda: permutation_test([1.0, 2.0], [1.0], n=0), "n=0"),
        (lambda: rank_test(1.0, []), "control values"),
        (lambda: rank_test(NAN, [1.0]), "observed value"),
        (lambda: set_rank_test([], [1.0]), "observed values"),
        (lambda: set_rank_test([1.0], [NAN]), "control values"),
        (lambda: holm([]), "p-values"),
        (lambda: holm([0.5, NAN]), "p-values"),
        (lambda: benjamini_hochberg([0.5, 1.5]), "1.5"),
        (lambda: benjamini_hochberg([-0.1]), "-0.1"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_bad_input_is_named(call: Callable[[], object], says: str) -> None:
    with pytest.raises(InterpError, match=says):
        call()
