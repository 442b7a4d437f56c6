"""Controls: known values, scipy as the oracle, and the false-positive rate of each on null data."""

from __future__ import annotations

import itertools
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


def within_level(hits: int, trials: int, level: float, *, calibrated: bool = True) -> bool:
    """Whether the count of rejections is one that `level` gives; chance of a wrong verdict 1e-5 a side."""
    low, high = stats.binom.ppf([1e-5, 1 - 1e-5], trials, level)
    return (low if calibrated else 0) <= hits <= high


# Bootstrap intervals


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


# Permutation tests


def test_permutation_counts_every_arrangement() -> None:
    """Two against three values: 10 relabellings, written out."""
    a, b = np.array([5.0, 1.0]), np.array([0.0, 2.0, 4.0])
    pooled, hits = np.concatenate([a, b]), 0
    for chosen in itertools.combinations(range(5), 2):
        rest = [i for i in range(5) if i not in chosen]
        hits += pooled[list(chosen)].mean() - pooled[rest].mean() >= a.mean() - b.mean() - 1e-12
    assert permutation_test(a, b, alternative="greater").p == hits / 10
    assert permutation_test(a, b).statistic == pytest.approx(1.0)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_permutation_agrees_with_scipy(paired: bool, alternative: str) -> None:
    rng = RNG(10)
    a, b = rng.normal(0.4, 1, 7), rng.normal(0, 1, 7)
    theirs = stats.permutation_test(
        (a, b),
        lambda x, y, axis: x.mean(axis) - y.mean(axis),
        permutation_type="samples" if paired else "independent",
        vectorized=True,
        n_resamples=10**5,
        alternative=alternative,
    )
    ours = permutation_test(a, b, paired=paired, alternative=alternative)
    assert ours.statistic == pytest.approx(theirs.statistic)
    assert ours.p == pytest.approx(theirs.pvalue, abs=1e-12)


def test_permutation_drawn_agrees_with_counted() -> None:
    rng = RNG(11)
    a, b = rng.normal(0.5, 1, 8), rng.normal(0, 1, 8)
    for paired in (False, True):
        counted = permutation_test(a, b, paired=paired, n=20_000).p  # 12,870 relabellings or 256 signs
        drawn = permutation_test(a, b, paired=paired, n=12_869 if not paired else 255, seed=2).p
        spread = 4 * np.sqrt(counted * (1 - counted) / (12_869 if not paired else 255))
        assert abs(drawn - counted) < spread


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("draw", ["normal", "heavy", "ties"])
def test_permutation_level(paired: bool, draw: str) -> None:
    """Rejections on null data at 5 % and 20 %: never above the level, and for continuous data not below it either."""
    trials, p = 500, []
    for trial in range(trials):
        rng = RNG(1000 + trial)
        a, b = {
            "normal": lambda rng=rng: rng.normal(size=(2, 12)),
            "heavy": lambda rng=rng: rng.standard_cauchy(size=(2, 12)),
            "ties": lambda rng=rng: rng.integers(3, size=(2, 12)).astype(float),
        }[draw]()
        p.append(permutation_test(a, b, paired=paired, n=199, seed=trial).p)
    for level in (0.05, 0.2):
        assert within_level(int(np.sum(np.array(p) <= level)), trials, level, calibrated=draw != "ties")


def test_permutation_is_never_zero_and_finds_a_real_effect() -> None:
    a, b = RNG(12).normal(3, 1, 30), RNG(13).normal(0, 1, 30)
    assert permutation_test(a, b, n=999).p == 1 / 1000
    assert permutation_test(a, b, n=999, alternative="less").p == 1.0


def test_permutation_edges() -> None:
    assert permutation_test([1.0], [2.0]).p == 1.0
    assert permutation_test([1.0], [2.0], paired=True).p == 1.0
    assert permutation_test([3.0] * 4, [3.0] * 5).p == 1.0
    one_against_many = permutation_test([10.0], np.arange(9.0), alternative="greater")
    assert one_against_many.p == pytest.approx(0.1)
    huge = permutation_test(np.array([1.0, 2.0]) + 1e9, np.array([1.0, 2.0]) + 1e9)
    assert huge.p == 1.0


def test_permutation_does_not_depend_on_units() -> None:
    a, b = RNG(14).normal(0.6, 1, 20), RNG(15).normal(0, 1, 20)
    plain = permutation_test(a, b).p
    assert permutation_test(1e-9 * a, 1e-9 * b).p == plain
    assert permutation_test(1e9 * a + 5e9, 1e9 * b + 5e9).p == plain
    close = permutation_test(np.round(a, 6) + 2.0**33, np.round(b, 6) + 2.0**33).p  # the offset dwarfs the spread
    assert close == pytest.approx(plain, abs=2e-4)


# Rank tests


def test_rank_test_by_hand() -> None:
    null = np.arange(1.0, 20.0)  # 1 .. 19
    assert rank_test(25, null) == pytest.approx(1 / 20)
    assert rank_test(19, null) == pytest.approx(2 / 20)  # a tie counts against the claim
    assert rank_test(0, null) == 1.0
    assert rank_test(0, null, "less") == pytest.approx(1 / 20)
    assert rank_test(25, null, "two-sided") == pytest.approx(2 / 20)
    assert rank_test(10, null, "two-sided") == 1.0


def test_rank_test_level() -> None:
    trials = 4000
    draws = RNG(16).normal(size=(trials, 20))
    p = np.array([rank_test(float(row[0]), row[1:]) for row in draws])
    for level in (0.05, 0.1, 0.5):
        assert within_level(int((p <= level + 1e-12).sum()), trials, level)
    coarse = np.round(draws)
    p = np.array([rank_test(float(row[0]), row[1:]) for row in coarse])
    assert within_level(int((p <= 0.05 + 1e-12).sum()), trials, 0.05, calibrated=False)


@pytest.mark.parametrize("alternative", ["greater", "less", "two-sided"])
def test_set_rank_agrees_with_scipy(alternative: str) -> None:
    rng = RNG(17)
    for n, m in ((1, 5), (4, 9), (12, 30)):
        x, y = rng.normal(0.5, 1, n), rng.normal(size=m)
        theirs = stats.mannwhitneyu(x, y, alternative=alternative, method="exact").pvalue
        assert set_rank_test(x, y, alternative) == pytest.approx(theirs, abs=1e-12)
    for x, y in ((rng.normal(0.2, 1, 60), rng.normal(size=90)), (rng.poisson(3.5, 50) * 1.0, rng.poisson(3, 70) * 1.0)):
        theirs = stats.mannwhitneyu(x, y, alternative=alternative, method="asymptotic").pvalue
        assert set_rank_test(x, y, alternative) == pytest.approx(theirs, rel=1e-9)


def test_set_rank_counts_ties_exactly() -> None:
    """Against every relabelling of the midranks, which scipy's exact method does not do."""
    x, y = np.array([3.0, 3.0, 5.0]), np.array([1.0, 3.0, 3.0, 4.0, 5.0])
    ranks = stats.rankdata(np.concatenate([x, y]))
    sums = np.array([ranks[list(chosen)].sum() for chosen in itertools.combinations(range(8), 3)])
    assert set_rank_test(x, y) == pytest.approx((sums >= ranks[:3].sum()).mean())
    assert set_rank_test(x, y, "less") == pytest.approx((sums <= ranks[:3].sum()).mean())


@pytest.mark.parametrize(("n", "m", "ties"), [(5, 20, False), (5, 20, True), (40, 60, False), (40, 60, True)])
def test_set_rank_level(n: int, m: int, ties: bool) -> None:
    trials = 1500
    draws = RNG(18).normal(size=(trials, n + m))
    draws = np.round(draws) if ties else draws
    p = np.array([set_rank_test(row[:n], row[n:]) for row in draws])
    for level in (0.05, 0.2):
        assert within_level(int((p <= level).sum()), trials, level, calibrated=not ties)


def test_set_rank_edges() -> None:
    assert set_rank_test([2.0], [2.0, 2.0]) == 1.0
    assert set_rank_test(np.ones(50), np.ones(50)) == 1.0
    assert set_rank_test([9.0], np.arange(9.0)) == pytest.approx(rank_test(9.0, np.arange(9.0)))
    largest = set_rank_test(np.arange(30.0) + 30, np.arange(30.0))  # one subset of C(60, 30), without overflow
    assert largest == pytest.approx(1 / 118264581564861424, rel=1e-9)


# Families of tests


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.2]) == pytest.approx([0.2])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])


def test_benjamini_hochberg_agrees_with_scipy() -> None:
    p = np.concatenate([RNG(19).uniform(size=50), [0.0, 1.0, 0.5, 0.5, 0.001]])
    assert benjamini_hochberg(p) == pytest.approx(stats.false_discovery_control(p, method="bh"))


@pytest.mark.needs_package("statsmodels")
def test_holm_agrees_with_statsmodels() -> None:
    from statsmodels.stats.multitest import multipletests

    p = np.concatenate([RNG(20).uniform(size=50), [0.0, 1.0, 0.5, 0.5, 0.001]])
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1])


@pytest.mark.parametrize("adjust", [holm, benjamini_hochberg])
def test_adjustment_keeps_order_and_follows_permutation(adjust: Callable[..., np.ndarray]) -> None:
    p = RNG(21).uniform(size=30)
    shuffle = RNG(22).permutation(30)
    adjusted = adjust(p)
    assert (adjusted >= p).all()
    assert (np.diff(adjusted[np.argsort(p)]) >= 0).all()
    assert adjust(p[shuffle]) == pytest.approx(adjusted[shuffle])


def _families(trials: int, n_null: int, n_real: int, shared: float) -> np.ndarray:
    """p-values of one-sided z-tests; nulls first; `shared` of the variance is common to a family."""
    rng = RNG(23)
    z = np.sqrt(shared) * rng.normal(size=(trials, 1)) + np.sqrt(1 - shared) * rng.normal(
        size=(trials, n_null + n_real)
    )
    z[:, n_null:] += 3.5
    return stats.norm.sf(z)


@pytest.mark.parametrize("shared", [0.0, 0.7])
def test_holm_familywise_error(shared: float) -> None:
    """Share of families with a false claim: at most 5 %, and not far below when the tests are independent nulls."""
    trials = 3000
    p = _families(trials, 20, 5, shared)
    wrong = sum(bool((holm(row)[:20] <= 0.05).any()) for row in p)
    assert within_level(wrong, trials, 0.05, calibrated=False)
    assert wrong > 0
    uncorrected = int((p[:, :20] <= 0.05).any(1).sum())
    assert uncorrected / trials > 0.15
    if shared == 0:
        nulls = sum(bool((holm(row) <= 0.05).any()) for row in p[:, :20])
        assert within_level(nulls, trials, 1 - (1 - 0.05 / 20) ** 20)


@pytest.mark.parametrize("shared", [0.0, 0.5])
def test_benjamini_hochberg_false_discovery_rate(shared: float) -> None:
    """Mean share of false claims: q * n_null / n for independent tests (their theorem), at most that for dependent."""
    trials, n_null, n_real, q = 4000, 30, 10, 0.1
    shares = []
    for row in _families(trials, n_null, n_real, shared):
        claimed = benjamini_hochberg(row) <= q
        shares.append(claimed[:n_null].sum() / max(1, claimed.sum()))
    expected = q * n_null / (n_null + n_real)
    error = np.std(shares) / np.sqrt(trials)
    assert np.mean(shares) <= expected + 4 * error
    if shared == 0:
        assert abs(np.mean(shares) - expected) < 4 * error


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
