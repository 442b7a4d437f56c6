"""Permutation tests, rank tests and families of tests: known values, scipy as the oracle, false-positive rates."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from interp.core.controls import benjamini_hochberg, holm, permutation_test, rank_test, set_rank_test

RNG = np.random.default_rng


def within_level(hits: int, trials: int, level: float, *, calibrated: bool = True) -> bool:
    """Whether the count of rejections is one that `level` gives; chance of a wrong verdict 1e-5 a side."""
    low, high = stats.binom.ppf([1e-5, 1 - 1e-5], trials, level)
    return (low if calibrated else 0) <= hits <= high


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
