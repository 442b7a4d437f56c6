"""Statistics against numpy and scipy on the whole data, merged in any grouping."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch

from interp.core.errors import InterpError
from interp.core.seed import torch_generator
from interp.instrument import statistics
from interp.instrument.statistics import Statistics


def _rows(n: int, d: int, *, offset: float = 0.0) -> torch.Tensor:
    x = torch.randn(n, d, generator=torch_generator(0, n, d), dtype=torch.float64) ** 3 + offset
    return x * torch.logspace(-3, 3, d, dtype=torch.float64)


def _tokens(n: int) -> list[torch.Tensor | None]:
    return [torch.arange(n) // 7, torch.arange(n) % 7, torch.arange(n) + 100]


@pytest.mark.parametrize(("n", "d"), [(1, 3), (2, 1), (500, 5), (333, 17)])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_they_equal_numpy_and_scipy(n, d, offset, monkeypatch):
    monkeypatch.setattr(statistics, "BLOCK_NUMBERS", 64)
    x = _rows(n, d, offset=offset)
    found, data = Statistics.of(x, _tokens(n)), x.numpy()
    assert found.count == n
    np.testing.assert_allclose(found.mean, data.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.variance, data.var(0), rtol=1e-9, atol=1e-18)
    norms = np.linalg.norm(data, axis=1)
    assert found.norm_mean == pytest.approx(norms.mean(), rel=1e-13)
    assert found.norm_max == pytest.approx(norms.max(), rel=1e-15)
    if n > 2:
        kurtosis = scipy.stats.kurtosis(data, axis=0, fisher=False)
        assert found.kurtosis == pytest.approx(kurtosis.mean(), rel=1e-8)
        skew = (found.m3 / n) / found.variance**1.5
        np.testing.assert_allclose(skew, scipy.stats.skew(data, axis=0), rtol=1e-6, atol=1e-8)
    for q in (0.0, 0.1, 0.5, 0.9, 1.0):
        exact = np.quantile(norms, q, method="inverted_cdf" if q == 1 else "higher")
        lower = np.quantile(norms, q, method="lower")
        assert lower / 2 ** (1 / 32) * 0.999 <= found.norm_quantile(q) <= exact * 2 ** (1 / 32) * 1.001


def test_the_largest_value_comes_with_its_token(monkeypatch):
    monkeypatch.setattr(statistics, "BLOCK_NUMBERS", 30)
    x = _rows(100, 10).float()
    x[57, 3] = -1e9
    x[60, 4] = 1e9  # a tie in another block: the first counts
    found = Statistics.of(x.view(100, 2, 5), _tokens(100))
    assert found.top == -1e9 and found.top_token == (57 // 7, 57 % 7, 157, 3)
    assert Statistics.of(x, [torch.arange(100), torch.arange(100), None]).top_token == (57, 57, -1, 3)


@pytest.mark.parametrize("cuts", [(10, 20, 70), (1, 1, 98), (50, 50), (0, 100)])
def test_merging_in_any_grouping_is_the_whole(cuts):
    x, tokens = _rows(100, 6, offset=50.0), _tokens(100)
    whole = Statistics.of(x, tokens)
    parts, start = [], 0
    for n in cuts:
        part = slice(start, start + n)
        parts.append(Statistics.of(x[part], [None if t is None else t[part] for t in tokens]))
        start += n
    left = parts[0]
    for part in parts[1:]:
        left = left.merge(part)
    right = parts[-1]
    for part in reversed(parts[:-1]):
        right = part.merge(right)
    for merged in (left, right):
        assert merged.count == 100 and merged.norm_max == whole.norm_max
        assert (merged.top, merged.top_token) == (whole.top, whole.top_token)
        assert torch.equal(merged.histogram, whole.histogram)
        for name in ("mean", "m2", "m3", "m4"):
            torch.testing.assert_close(getattr(merged, name), getattr(whole, name), rtol=1e-10, atol=1e-9)


def test_constant_coordinates_are_left_out_of_the_kurtosis_and_nothing_is_divided_by_zero():
    x = torch.zeros(40, 3)
    x[:, 1] = torch.tensor([1.0, -1.0]).repeat(20)
    found = Statistics.of(x, _tokens(40))
    assert found.kurtosis == 1.0  # a fair coin
    assert found.norm_quantile(0.5) == pytest.approx(1.0, rel=0.03)
    still = Statistics.of(torch.zeros(4, 3), _tokens(4))
    assert still.summary()["kurtosis"] is None and still.norm_quantile(0.5) == 0.0 and still.top == 0.0


def test_tensors_keep_every_bit():
    found = Statistics.of(_rows(30, 4), _tokens(30))
    again = Statistics.from_tensors(found.tensors())
    assert again.summary() == found.summary()
    assert all(torch.equal(getattr(again, k), getattr(found, k)) for k in ("mean", "m2", "m3", "m4", "histogram"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_input_is_not_changed(dtype):
    x = _rows(20, 4).clamp(-1e4, 1e4).to(dtype)
    before = x.clone()
    Statistics.of(x, _tokens(20))
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Statistics.empty(3).merge(Statistics.empty(4)), "3 and 4 coordinates do not merge"),
        (lambda: Statistics.empty(3).norm_quantile(0.5), "needs rows"),
        (lambda: Statistics.of(torch.tensor([[1.0, float("nan")]]), _tokens(1)), "NaN or infinity"),
        (lambda: Statistics.of(torch.tensor([[1.0, float("inf")]]), _tokens(1)), "NaN or infinity"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InterpError, match=message):
        call()
