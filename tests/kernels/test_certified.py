"""Exact top-k by certified bfloat16 bounds: against float64, on rows made to break the bound, and on rows that must
fall back. The fast path is forced: without it these shapes are too small to be worth it."""

from __future__ import annotations

import pytest
import torch
from interp.kernels.bounds import EXTRA, lower_encoder, rounded_up, upper_bounds
from interp.kernels.sampled import sampled_eager, sampled_product
from interp.kernels.topk_encode import preactivations, topk_encode, topk_encode_eager
from interp.kernels.workspace import Workspace

from interp.kernels import certified


def case(batch: int = 33, d: int = 37, m: int = 517, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, d, generator=generator)
    W_enc = torch.randn(m, d, generator=generator).t()
    return x, W_enc, torch.randn(m, generator=generator)


def reference(x, W_enc, b_enc):
    return x.double() @ W_enc.double() + b_enc.double()


def assert_exact(found, z, k):
    """Same values as top-k of the float64 pre-activations, at distinct indices that have these values."""
    values, indices = found
    assert values.shape == indices.shape == (len(z), k) and indices.dtype == torch.long
    scale = float(z.abs().max()) * 1e-6 + 1e-9
    assert all(len(set(row)) == k for row in indices.tolist())
    expected = z.topk(k).values
    torch.testing.assert_close(values.double().sort(1, descending=True).values, expected, rtol=0, atol=scale)
    torch.testing.assert_close(z.gather(1, indices), values.double(), rtol=0, atol=scale)


@pytest.mark.parametrize(
    ("batch", "d", "m", "k"),
    [(33, 37, 517, 5), (1, 8, 64, 1), (5, 1, 100, 3), (300, 64, 1024, 32), (17, 576, 2304, 16), (4, 7, 8 * 8, 8)],
)
def test_random_rows_equal_float64_topk_and_none_fall_back(batch, d, m, k):
    x, W_enc, b_enc = case(batch, d, m)
    workspace = Workspace(fast=True)
    assert_exact(topk_encode(x, W_enc, b_enc, k, workspace), reference(x, W_enc, b_enc), k)
    counters = workspace.counters
    assert (counters.fast, counters.plain) == (batch, 0)
    # with d = 1 all latents lie on one line, and the narrow dictionaries have few groups: there rows may fall back
    assert counters.dense == 0 or (d == 1 or m <= 8 * k + 64)
    assert k * (batch - counters.dense) <= counters.candidates < m * batch


def test_bounds_are_upper_bounds_also_where_all_roundings_point_one_way():
    x, W_enc, b_enc = case(40, 64, 300)
    one_way = 1 + 2.0**-8 - 2.0**-12  # rounded down to 1 by nearly half a unit: the error is parallel to the vector
    x[:10] = one_way
    x[10:20] = -one_way
    W_enc[:, :50] = one_way
    W_enc[:, 50:100] = -one_way * torch.logspace(-6, 4, 50)
    x[20] = 0.0
    x[21] *= 1e-20
    x[22] *= 1e4
    b_enc[:5] = torch.tensor([1e6, -1e6, 0.0, one_way, 1e-30])
    workspace = Workspace()
    lowered = lower_encoder(W_enc, b_enc, workspace)
    bounds, typical, error = upper_bounds(x, lowered, workspace)
    z = reference(x, W_enc, b_enc)
    ours = bounds[:, :300].double()
    # the stored number is the bound rounded to nearest, so compare after the same rounding
    assert (ours >= z.float().bfloat16().double()).all()
    assert torch.isfinite(error).all() and (typical >= 0).all()
    plain = (x.bfloat16().double() @ W_enc.bfloat16().double() + b_enc.bfloat16().double()).float().bfloat16().double()
    assert (plain < z.float().bfloat16().double()).any()  # without the extra coordinates it would be none
    assert (bounds[:, 300:] < -1e37).all()
    assert lowered.rows.shape[1] >= 64 + EXTRA


def test_numbers_that_are_added_to_a_bound_are_never_rounded_down():
    """Rounding to nearest would take half of them below their value: the bound would be one by luck."""
    drawn = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    values = drawn * 10.0 ** torch.arange(-20, 20).repeat(250)
    assert bool((values.bfloat16().float() < values).any())
    assert bool((rounded_up(values).float() >= values).all())
    assert bool((rounded_up(values).float() - values <= values.abs() * 2.0**-6).all()), "and not by more than they need"


def test_all_of_the_top_in_one_group():
    """Strided groups see one maximum there, so the guess is far too low and the candidates many; still exact."""
    x, W_enc, b_enc = case(20, 24, 640)
    k = 8
    n_groups = certified.GROUPS_PER_K * k
    W_enc[:, 3::n_groups] = x[0][:, None] * torch.linspace(2, 3, len(range(3, 640, n_groups)))
    workspace = Workspace(fast=True)
    assert_exact(topk_encode(x, W_enc, b_enc, k, workspace), reference(x, W_enc, b_enc), k)


def test_latents_that_bfloat16_cannot_tell_apart_are_ordered_by_their_exact_values():
    x, W_enc, b_enc = case(16, 24, 512)
    k = 4
    generator = torch.Generator().manual_seed(5)
    W_enc[:, :40] = x[0][:, None] * (1 + 2.0**-12 * torch.rand(40, generator=generator))
    bits = W_enc[:, :40].bfloat16()
    assert len(bits.unique(dim=1)[0]) < 8
    workspace = Workspace(fast=True)
    found = topk_encode(x, W_enc, b_enc * 0, k, workspace)
    assert_exact(found, reference(x, W_enc, b_enc * 0), k)
    expected = set(reference(x, W_enc, b_enc * 0)[0].topk(k).indices.tolist())
    assert set(found[1][0].tolist()) == expected
    assert workspace.counters.dense == 0


def test_a_row_whose_bounds_mislead_is_certified_at_a_lower_threshold():
    """Latents of large norm that the row does not touch have large bounds and small values: the guess is too high."""
    x, W_enc, b_enc = case(12, 32, 512)
    k = 8
    x[:, 16:] = 0.0
    W_enc *= 0.01
    W_enc[:16, :100] = 0.0
    W_enc[16:, :100] = 20.3
    b_enc = torch.zeros(512)
    b_enc[:100] = 0.05
    workspace = Workspace(fast=True)
    assert_exact(topk_encode(x, W_enc, b_enc, k, workspace), reference(x, W_enc, b_enc), k)
    assert workspace.counters.lowered == 12 and workspace.counters.dense == 0


@pytest.mark.parametrize("how", ["ties", "negative", "too many", "zeros"])
def test_rows_that_cannot_be_certified_are_done_densely(how):
    x, W_enc, b_enc = case(10, 24, 1600)
    k = 2
    if how == "ties":
        W_enc[:] = W_enc[:, :1].clone()
        x[:] = x[:1].abs() * W_enc[:, 0].sign()
        b_enc[:] = 1.0
    elif how == "negative":
        b_enc -= 1000.0
    elif how == "too many":
        b_enc[:] = 100.0 + 1e-3 * b_enc
        W_enc *= 1e-3
    else:
        x[:], b_enc[:] = 0.0, 0.0
    workspace = Workspace(fast=True)
    assert_exact(topk_encode(x, W_enc, b_enc, k, workspace), reference(x, W_enc, b_enc), k)
    assert workspace.counters.dense == 10 and workspace.counters.fallback_rate == 1.0


def test_only_the_rows_that_need_it_fall_back():
    x, W_enc, b_enc = case(30, 24, 512)
    x[7] = 0.0  # every pre-activation is the bias, which is not positive
    workspace = Workspace(fast=True)
    b_enc = -b_enc.abs()
    assert_exact(topk_encode(x, W_enc, b_enc, 3, workspace), reference(x, W_enc, b_enc), 3)
    assert workspace.counters.dense == 1 and workspace.counters.fallback_rate == pytest.approx(1 / 30)
    workspace.reset()
    assert workspace.counters.fast == 0


@pytest.mark.parametrize("where", ["row", "column", "bias"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_what_is_not_finite_is_left_to_the_dense_product(where, bad):
    x, W_enc, b_enc = case(6, 24, 512)
    {"row": x[2:3, 5:6], "column": W_enc[3:4, 9:10], "bias": b_enc[9:10]}[where][:] = bad
    workspace = Workspace(fast=True)
    values, _ = topk_encode(x, W_enc, b_enc, 3, workspace)
    expected, _ = topk_encode_eager(x, W_enc, b_enc, 3)
    assert workspace.counters.dense == (1 if where == "row" else 6)
    descending = [t.sort(1, descending=True).values for t in (values, expected)]
    torch.testing.assert_close(*descending, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_value_does_not_depend_on_the_batch_or_on_the_path():
    x, W_enc, b_enc = case(64, 48, 1024)
    k = 8
    workspace = Workspace(fast=True)
    values, indices = topk_encode(x, W_enc, b_enc, k, workspace)
    for row in (0, 13, 63):
        alone, at = topk_encode(x[row : row + 1], W_enc, b_enc, k, Workspace(fast=True))
        dense, there = certified.dense_rows(x[row : row + 1], W_enc, b_enc, k, workspace)
        for found, index in ((alone, at), (dense, there)):
            order, expected = index[0].argsort(), indices[row].argsort()
            assert torch.equal(index[0][order], indices[row][expected])
            assert torch.equal(found[0][order], values[row][expected])


def test_two_runs_are_bitwise_equal_also_in_another_workspace():
    x, W_enc, b_enc = case(50, 24, 512)
    workspace = Workspace(fast=True)
    first = topk_encode(x, W_enc, b_enc, 6, workspace)
    topk_encode(x[:3] * 5, W_enc * 2, b_enc, 6, workspace)  # other content in the same memory
    for again in (topk_encode(x, W_enc, b_enc, 6, workspace), topk_encode(x, W_enc, b_enc, 6, Workspace(fast=True))):
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_a_frozen_encoder_is_lowered_once_and_any_other_every_time():
    x, W_enc, b_enc = case()
    frozen, watching = Workspace(fast=True, frozen=True), Workspace(fast=True)
    first = lower_encoder(W_enc, b_enc, frozen)
    assert lower_encoder(W_enc, b_enc, frozen) is first
    topk_encode(x, W_enc, b_enc, 5, watching)
    W_enc.data.mul_(-1.0)  # no version counter sees this
    assert_exact(topk_encode(x, W_enc, b_enc, 5, watching), reference(x, W_enc, b_enc), 5)
    frozen.forget()
    assert lower_encoder(W_enc, b_enc, frozen) is not first


def test_strided_inputs_parameters_and_chunks(monkeypatch):
    monkeypatch.setattr(certified, "CHUNK_BYTES", 2 * 576 * 10)  # ten rows at once
    x, W_enc, b_enc = case(45, 24, 512)
    x = torch.cat([x, x], 1)[:, ::2].clone().t().contiguous().t()
    W_enc = W_enc.contiguous().requires_grad_()
    b_enc = torch.stack([b_enc, b_enc], 1)[:, 0].requires_grad_()
    found = topk_encode(x, W_enc, b_enc, 5, Workspace(fast=True))
    assert_exact(found, reference(x, W_enc, b_enc).detach(), 5)
    assert not found[0].requires_grad


def test_when_the_fast_path_is_taken():
    x, W_enc, b_enc = case(8, 16, 256)
    asked = Workspace(fast=True)
    assert certified.suits(x, W_enc, b_enc, 4, asked)
    assert not certified.suits(x, W_enc, b_enc, 4, Workspace())  # too small to pay
    assert not certified.suits(x, W_enc, b_enc, 4, Workspace(fast=False))
    assert not certified.suits(x, W_enc, b_enc, 64, asked)  # a quarter of all latents
    assert not certified.suits(x.double(), W_enc.double(), b_enc.double(), 4, asked)
    assert not certified.suits(x.bfloat16(), W_enc, b_enc, 4, asked)
    assert not certified.suits(x[:0], W_enc, b_enc, 4, asked)
    values, indices = topk_encode(x[:0], W_enc, b_enc, 4, asked)
    assert values.shape == indices.shape == (0, 4)
    topk_encode(x, W_enc, b_enc, 64, asked)
    assert asked.counters.plain == 8
    big = torch.zeros(1, 1).expand(2048, 512), torch.zeros(1, 1).expand(512, 8192), torch.zeros(1).expand(8192)
    assert certified.suits(*big, 32, Workspace()) == certified.fast_bfloat16()
    assert not certified.suits(big[0][:8], *big[1:], 32, Workspace())


def test_workspace_keeps_its_memory():
    workspace = Workspace()
    x, W_enc, b_enc = case()
    z = preactivations(x, W_enc, b_enc, workspace)
    torch.testing.assert_close(z, x @ W_enc + b_enc)
    again = preactivations(x[:3], W_enc, b_enc, workspace)
    assert again.data_ptr() == z.data_ptr() and workspace.nbytes == z.numel() * 4
    assert workspace.take("dense", 2, 2, torch.bfloat16, "cpu").dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("strided", [False, True])
def test_sampled_product(dtype, strided):
    generator = torch.Generator().manual_seed(1)
    left = torch.randn(5, 37, generator=generator, dtype=dtype)
    right = torch.randn(11, 37, generator=generator, dtype=dtype)
    if strided:
        left, right = (t.t().contiguous().t() for t in (left, right))
    starts = torch.tensor([0, 3, 3, 4, 9, 12])  # an empty row
    columns = torch.tensor([5, 5, 0, 10, 9, 8, 1, 1, 2, 0, 0, 0])  # unsorted, repeated
    found = sampled_product(left, right, starts, columns)
    rows = [0, 0, 0, 2, 3, 3, 3, 3, 3, 4, 4, 4]
    expected = torch.tensor([float(left[r].double() @ right[c].double()) for r, c in zip(rows, columns, strict=True)])
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, sampled_eager(left, right, starts, columns))
    assert sampled_product(left, right, torch.zeros(6, dtype=torch.long), columns[:0]).shape == (0,)
