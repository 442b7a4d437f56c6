"""Batch top-k, thresholds and group-max: the fast CPU path against loops over float64 pre-activations."""

from __future__ import annotations

import pytest
import torch
from interp.kernels.batch_encode import (
    batch_topk_encode,
    batch_topk_encode_eager,
    groupmax_encode,
    threshold_encode,
    threshold_encode_eager,
)
from interp.kernels.workspace import Workspace

from interp.kernels import batch_encode


def case(batch: int = 23, d: int = 37, m: int = 517, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, d, generator=generator)
    return x, torch.randn(m, d, generator=generator).t(), torch.randn(m, generator=generator)


def dense(selected, indices, m):
    """Codes as a matrix, by a loop; a spare slot must hold 0 and latent 0, an active latent occurs once a row."""
    out = torch.zeros(len(selected), m, dtype=torch.float64)
    for row in range(len(selected)):
        for value, latent in zip(selected[row].tolist(), indices[row].tolist(), strict=True):
            assert value != 0.0 or latent == 0
            assert value == 0.0 or out[row, latent] == 0
            out[row, latent] += value
    return out


def expected_batch(x, W_enc, b_enc, k_total):
    """The k_total largest positive ones, found by sorting everything."""
    z = x.double() @ W_enc.double() + b_enc.double()
    order = sorted(((value, place) for place, value in enumerate(z.flatten().tolist()) if value > 0), reverse=True)
    out = torch.zeros(z.numel(), dtype=torch.float64)
    for value, place in order[:k_total]:
        out[place] = value
    return out.view_as(z), (order[:k_total][-1][0] if order else 0.0)


WORKSPACES = {"fast": lambda: Workspace(fast=True), "plain": lambda: Workspace(fast=False), "none": lambda: None}


@pytest.mark.parametrize("how", list(WORKSPACES))
@pytest.mark.parametrize("k_total", [1, 7, 23 * 5, 23 * 5 + 3])
def test_batch_topk(how, k_total):
    x, W_enc, b_enc = case()
    x[4] *= 6.0  # one row takes far more than its share
    x[5] *= 1e-3
    b_enc -= 0.5
    workspace = WORKSPACES[how]()
    selected, indices, threshold = batch_topk_encode(x, W_enc, b_enc, k_total, workspace)
    expected, smallest = expected_batch(x, W_enc, b_enc, k_total)
    torch.testing.assert_close(dense(selected, indices, 517), expected, rtol=1e-5, atol=1e-5)
    assert selected.shape[1] == (expected > 0).sum(1).max() and int((selected > 0).sum()) == k_total
    assert threshold.ndim == 0 and float(threshold) == pytest.approx(smallest, rel=1e-5)
    if how == "fast":
        assert (workspace.counters.fast, workspace.counters.dense) == (23, 0)


@pytest.mark.parametrize("how", list(WORKSPACES))
def test_batch_topk_keeps_what_is_positive_and_no_more(how):
    x, W_enc, b_enc = case()
    b_enc[:] = -1000.0
    b_enc[[3, 200]] = torch.tensor([1000.0, 900.0])
    selected, indices, threshold = batch_topk_encode(x, W_enc, b_enc, 100, WORKSPACES[how]())
    assert selected.shape == (23, 2) and (selected > 0).all()
    assert (indices == torch.tensor([3, 200])).all()  # in order of the latents
    assert float(threshold) == float(selected.min())
    b_enc[:] = -1000.0
    selected, indices, threshold = batch_topk_encode(x, W_enc, b_enc, 100, WORKSPACES[how]())
    assert selected.shape == indices.shape == (23, 0) and float(threshold) == 0.0


@pytest.mark.parametrize("how", ["ties", "inf", "low guess"])
def test_batch_topk_falls_back_and_stays_exact(how):
    x, W_enc, b_enc = case(m=640)
    k_total = 23 * 4
    if how == "ties":
        W_enc, b_enc = W_enc * 0, b_enc * 0 + 1
    elif how == "inf":
        b_enc[17] = float("inf")
    else:  # large bounds, small values: the first threshold is too high
        x[:, 16:], W_enc[16:, :20], W_enc[:16, :20] = 0.0, 50.3, 0.0
        W_enc[:, 20:] *= 0.01
        b_enc[:] = 0.0
        b_enc[:20] = torch.linspace(0.2, 0.3, 20)
    workspace = Workspace(fast=True)
    selected, _, threshold = batch_topk_encode(x, W_enc, b_enc, k_total, workspace)
    reference = batch_topk_encode_eager(x, W_enc, b_enc, k_total)
    ours, theirs = (t[t > 0].sort().values for t in (selected, reference[0]))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(threshold, reference[2], rtol=1e-5, atol=1e-5)
    assert workspace.counters.fallback_rate == (0.0 if how == "low guess" else 1.0)


@pytest.mark.parametrize("how", list(WORKSPACES))
@pytest.mark.parametrize("theta", ["number", "per latent", "negative", "never"])
def test_threshold(how, theta, monkeypatch):
    monkeypatch.setattr(batch_encode, "CHUNK_BYTES", 2 * 576 * 5)  # five rows at once
    x, W_enc, b_enc = case()
    generator = torch.Generator().manual_seed(8)
    level = {
        "number": 12.0,
        "per latent": 15 + torch.randn(517, generator=generator),
        "negative": -3.0,
        "never": 1e4,
    }[theta]
    workspace = WORKSPACES[how]()
    selected, indices = threshold_encode(x, W_enc, b_enc, level, workspace)
    z = x.double() @ W_enc.double() + b_enc.double()
    expected = torch.where(z > level, z, 0.0)
    torch.testing.assert_close(dense(selected, indices, 517), expected, rtol=1e-5, atol=1e-5)
    assert selected.shape[1] == int((expected != 0).sum(1).max())
    if how == "fast":  # more than a sixteenth pass a negative threshold: the dense product is cheaper
        assert workspace.counters.fallback_rate == (1.0 if theta == "negative" else 0.0)


def test_a_frozen_workspace_tells_thresholds_apart():
    x, W_enc, b_enc = case()
    workspace = Workspace(fast=True, frozen=True)
    for level in (12.0, torch.full((517,), 16.0), torch.tensor(14.0), 12.0):
        for _ in range(2):
            ours = threshold_encode(x, W_enc, b_enc, level, workspace)
            theirs = threshold_encode_eager(x, W_enc, b_enc, torch.as_tensor(level))
            assert torch.equal(ours[1], theirs[1])
            torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [1, 11, 47, 517])
def test_groupmax(k):
    x, W_enc, b_enc = case()
    selected, indices = groupmax_encode(x, W_enc, b_enc, k)
    z = x @ W_enc + b_enc
    size = 517 // k
    for row in range(3):
        for group in range(k):
            block = z[row, group * size : (group + 1) * size].tolist()
            assert int(indices[row, group]) == group * size + block.index(max(block))
    torch.testing.assert_close(selected, z.gather(1, indices))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, W, b: groupmax_encode(x, W, b, 5), "d_dict=517 is not a multiple of k=5"),
        (lambda x, W, b: groupmax_encode(x, W, b, 0), "k=0"),
        (lambda x, W, b: batch_topk_encode(x, W, b, 0), "k_total=0 is not in 1..batch"),
        (lambda x, W, b: batch_topk_encode(x, W, b, 23 * 517 + 1), "k_total="),
        (lambda x, W, b: threshold_encode(x, W, b, torch.zeros(3)), "neither a number nor one per latent"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*case())


def test_empty_batch():
    x, W_enc, b_enc = case()
    assert threshold_encode(x[:0], W_enc, b_enc, 1.0)[0].shape == (0, 0)
    selected, indices, threshold = batch_topk_encode(x[:0], W_enc, b_enc, 5)
    assert selected.shape == indices.shape == (0, 0) and float(threshold) == 0.0
    assert groupmax_encode(x[:0], W_enc, b_enc, 11)[0].shape == (0, 11)
