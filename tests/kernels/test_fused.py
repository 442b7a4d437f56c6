"""The fused encoder in Triton: against float64, on shapes and rows made to break tiles, groups and the certificate."""

from __future__ import annotations

import pytest
import torch
from interp.kernels.fused_encode import (
    certify,
    choose_groups,
    fused_groupmax,
    fused_topk,
    suits_fused,
    topk_from_groups,
    two_pass_topk,
)
from interp.kernels.group_top import dense_triton, group_top_eager, group_top_triton, select_triton
from interp.kernels.workspace import Workspace

from interp.kernels import group_top, topk_encode

pytestmark = pytest.mark.needs_package("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = {"BM": 16, "BN": 64, "BK": 16, "num_warps": 4, "num_stages": 1}


def case(batch: int, d: int, m: int, dtype: torch.dtype = torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, d, generator=generator)
    W_enc = torch.randn(m, d, generator=generator)
    b_enc = torch.randn(m, generator=generator)
    x, W_enc, b_enc = (t.to(DEVICE, dtype) for t in (x, W_enc, b_enc))
    return x, W_enc.t(), b_enc


def exact(x, W_enc, b_enc):
    return x.double() @ W_enc.double() + b_enc.double()


def assert_top(found, z, k, dtype):
    values, indices = found
    assert values.dtype == dtype and values.shape == indices.shape == (len(z), k)
    assert all(len(set(row)) == k for row in indices.tolist())
    # sums are float32; what is left is one rounding to the type of the inputs
    step = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    scale = float(z[z.isfinite()].abs().max())
    expected = z.topk(k).values
    torch.testing.assert_close(values.double().sort(1, descending=True).values, expected, rtol=step, atol=1e-6 * scale)
    torch.testing.assert_close(z.gather(1, indices), values.double(), rtol=step, atol=1e-6 * scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "d", "m", "group", "t"),
    [(5, 24, 130, 16, 3), (17, 16, 64, 64, 1), (1, 1, 200, 32, 2), (33, 37, 96, 8, 3), (0, 8, 64, 16, 1)],
)
def test_groups_keep_their_largest(batch, d, m, group, t, dtype):
    x, W_enc, b_enc = case(batch, d, m, dtype)
    kept, places = group_top_triton(x, W_enc, b_enc, t, group, SMALL)
    z = exact(x, W_enc, b_enc)
    expected, _ = group_top_eager(z.float(), t, group)
    assert kept.shape == places.shape == (batch, t, -(-m // group)) and places.dtype == torch.uint8
    torch.testing.assert_close(kept, expected, rtol=1e-5, atol=1e-5)
    columns = (torch.arange(-(-m // group), device=DEVICE) * group + places.long()).clamp(max=m - 1)
    there = kept > -torch.inf
    found = z.gather(1, columns.flatten(1)).view_as(kept)
    torch.testing.assert_close(found[there].float(), kept[there], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dense_triton(x, W_enc, b_enc, SMALL).double(), z, rtol=1e-5, atol=1e-4)


def test_groups_of_given_preactivations():
    x, W_enc, b_enc = case(11, 24, 300)
    z = exact(x, W_enc, b_enc).float()
    for given in (z, z.t().contiguous().t(), z.bfloat16()):
        kept, places = select_triton(given, 3, 32)
        expected = group_top_eager(given, 3, 32)
        assert torch.equal(kept, expected[0])
        if given.dtype == torch.float32:  # bfloat16 has ties
            assert torch.equal(places[kept > -torch.inf], expected[1][kept > -torch.inf])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "d", "m", "k"), [(7, 24, 700, 6), (3, 50, 1030, 1), (20, 16, 1024, 8), (1, 33, 2048, 10)]
)
def test_topk_equals_float64(batch, d, m, k, dtype):
    x, W_enc, b_enc = case(batch, d, m, dtype)
    workspace = Workspace(fast=True)
    assert_top(fused_topk(x, W_enc, b_enc, k, workspace, SMALL), exact(x, W_enc, b_enc), k, dtype)
    assert workspace.counters.fast == batch
    z = exact(x, W_enc, b_enc).to(dtype)
    assert_top(two_pass_topk(z, k, workspace), z.double(), k, dtype)


def test_the_default_tiles_also_work():
    for dtype in DTYPES:
        x, W_enc, b_enc = case(3, 40, 600, dtype)
        assert_top(fused_topk(x, W_enc, b_enc, 4, Workspace()), exact(x, W_enc, b_enc), 4, dtype)


def test_rows_whose_top_sits_in_one_group_are_found_and_done_again():
    x, W_enc, b_enc = case(9, 24, 640)
    k = 6
    shape = choose_groups(k, 640)
    assert shape is not None
    t, group = shape
    W_enc[:, group : group + k] = x[2][:, None] * torch.linspace(1, 2, k, device=DEVICE)
    z = exact(x, W_enc, b_enc)
    kept, places = group_top_triton(x, W_enc, b_enc, t, group, SMALL)
    values, _, sure = certify(kept, places, k, group)
    true = z.topk(k).values.amin(1)
    wrong = (values.double().amin(1) - true).abs() > 1e-4
    assert wrong[2] and not sure[2]  # without the certificate the answer would be wrong there
    assert not (wrong & sure).any()
    workspace = Workspace()
    assert_top(fused_topk(x, W_enc, b_enc, k, workspace, SMALL), z, k, torch.float32)
    assert 1 <= workspace.counters.dense < 9


def test_ties_and_zeros():
    x, W_enc, b_enc = case(4, 16, 640)
    x[0] = 0.0
    b_enc[:] = 0.5
    W_enc[:, ::2] = W_enc[:, :1].clone()
    assert_top(fused_topk(x, W_enc, b_enc, 5, Workspace(), SMALL), exact(x, W_enc, b_enc), 5, torch.float32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_counts_as_torch_counts_it(bad):
    x, W_enc, b_enc = case(5, 16, 640)
    b_enc[100] = bad
    workspace = Workspace()
    found = fused_topk(x, W_enc, b_enc, 4, workspace, SMALL)[0].sort(1).values
    expected = (x @ W_enc + b_enc).topk(4).values.sort(1).values
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert workspace.counters.dense == (5 if bad != bad else workspace.counters.dense)


def test_masked_latents_are_not_selected_twice():
    x, W_enc, b_enc = case(3, 16, 640)
    b_enc[5:] = float("-inf")
    values, indices = fused_topk(x, W_enc, b_enc, 7, Workspace(), SMALL)
    assert all(len(set(row)) == 7 for row in indices.tolist())
    assert (values > float("-inf")).sum().item() == 3 * 5


def test_topk_encode_takes_it_when_asked(monkeypatch):
    x, W_enc, b_enc = case(5, 24, 640)
    workspace = Workspace(fast=True)
    assert suits_fused(x, W_enc, b_enc, 5, workspace) == (DEVICE == "cuda")
    assert not suits_fused(x, W_enc, b_enc, 5, Workspace())  # not timed on a device yet
    monkeypatch.setattr(topk_encode, "suits", lambda *_: False)
    monkeypatch.setattr(topk_encode, "suits_fused", lambda *_: True)
    found = topk_encode.topk_encode(x, W_enc, b_enc, 5, workspace)
    assert_top(found, exact(x, W_enc, b_enc), 5, torch.float32)
    assert workspace.counters.fast == 5


def test_strided_inputs():
    x, W_enc, b_enc = case(6, 24, 640)
    x = x.t().contiguous().t()
    W_enc = W_enc.contiguous()
    b_enc = torch.stack([b_enc, b_enc], 1)[:, 0]
    assert_top(fused_topk(x, W_enc, b_enc, 5, Workspace(), SMALL), exact(x, W_enc, b_enc), 5, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "k"), [(640, 10), (640, 80), (192, 1), (480, 20)])
def test_groupmax(m, k, dtype):
    x, W_enc, b_enc = case(7, 24, m, dtype)
    values, indices = fused_groupmax(x, W_enc, b_enc, k, SMALL)
    z = exact(x, W_enc, b_enc)
    size = m // k
    expected = torch.stack([z[:, g * size : (g + 1) * size].amax(1) for g in range(k)], 1)
    step = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    torch.testing.assert_close(values.double(), expected, rtol=step, atol=1e-5)
    torch.testing.assert_close(z.gather(1, indices), expected, rtol=1e-5, atol=1e-5)
    assert (indices // size == torch.arange(k, device=DEVICE)).all()


def test_groups_are_chosen_so_that_few_rows_fail():
    """The estimate of failing rows against a simulation with independent latents."""
    assert choose_groups(64, 131072) == (3, 64)
    shape = choose_groups(32, 8192)
    assert shape is not None
    t, group = shape
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1000, 8192, generator=generator)
    rates = []
    for kept in (t, t - 1):
        workspace = Workspace()
        found = topk_from_groups(*group_top_eager(z, kept, group), 32, group, lambda rows: z[rows], workspace)
        assert torch.equal(found[0].sort(1).values, z.topk(32).values.sort(1).values)
        rates.append(workspace.counters.fallback_rate)
    assert rates[0] < 0.01 < rates[1]
    assert choose_groups(512, 1024) is None and choose_groups(8192, 8192) is None


def test_too_many_for_groups_is_refused():
    x, W_enc, b_enc = case(2, 8, 64)
    with pytest.raises(ValueError, match="k=60 of 64 latents is too many"):
        fused_topk(x, W_enc, b_enc, 60, Workspace())
    with pytest.raises(ValueError, match="k=60 of 64 latents is too many"):
        two_pass_topk(x @ W_enc, 60, Workspace())
    with pytest.raises(ValueError, match="64 latents do not make 16 groups"):
        fused_groupmax(x, W_enc, b_enc, 16)


def test_two_runs_are_bitwise_equal():
    x, W_enc, b_enc = case(8, 40, 640, torch.bfloat16)
    first, second = (fused_topk(x, W_enc, b_enc, 5, Workspace(), SMALL) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert set(group_top.TILES) == set(DTYPES)
