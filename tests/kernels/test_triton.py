"""The Triton kernels against their eager twins and against naive loops: on a GPU where there is one, interpreted on the
CPU otherwise (`tests/conftest.py` sets TRITON_INTERPRET before anything imports triton)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interp.kernels.segments import by_latent, pieces

from interp.kernels import sparse_decode as sd
from interp.kernels import sparse_grad as sg

pytestmark = pytest.mark.needs_package("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Relative to the largest entry: sums are float32, so what is left is the rounding of the output."""

SHAPES = [
    pytest.param(5, 3, 7, 11, id="odd"),
    pytest.param(4, 1, 16, 9, id="k=1"),
    pytest.param(3, 6, 10, 6, id="k=d_dict"),
    pytest.param(0, 4, 8, 12, id="empty-batch"),
    pytest.param(6, 5, 1, 1, id="one-latent-one-coordinate"),
    pytest.param(2, 3, 1030, 5, id="wider-than-a-block"),
]


def case(batch: int, k: int, d: int, d_dict: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(batch * 1000 + k * 100 + d)
    values = torch.randn(batch, k, generator=generator)
    values[:, -1] = 0.0  # a slot that the ReLU emptied
    indices = torch.randint(0, d_dict, (batch, k), generator=generator)  # duplicates whenever k > 1
    if k == d_dict:
        indices = torch.arange(d_dict).expand(batch, k).contiguous()
    rows = torch.randn(d_dict, d, generator=generator)
    grad = torch.randn(batch, d, generator=generator)
    return tuple(t.to(DEVICE, dtype) if t.is_floating_point() else t.to(DEVICE) for t in (values, indices, rows, grad))


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.shape == expected.shape
    scale = max(float(expected.abs().max()) if expected.numel() else 0.0, 1e-6)
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=TOLERANCE[dtype] * scale)


def dense(values: torch.Tensor, indices: torch.Tensor, d_dict: int) -> torch.Tensor:
    """The naive oracle: codes as a matrix, filled by a loop, in float64."""
    out = torch.zeros(values.shape[0], d_dict, dtype=torch.float64, device=values.device)
    for b in range(values.shape[0]):
        for j in range(values.shape[1]):
            out[b, indices[b, j]] += values[b, j].double()
    return out


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("batch", "k", "d", "d_dict"), SHAPES)
def test_decode(batch, k, d, d_dict, dtype):
    values, indices, rows, _ = case(batch, k, d, d_dict, dtype)
    found = sd.decode_triton(values, indices, rows)
    assert found.dtype == dtype
    close(found, sd.decode_eager(values, indices, rows), dtype)
    close(found, dense(values, indices, d_dict) @ rows.double(), dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("batch", "k", "d", "d_dict"), SHAPES)
def test_values_grad(batch, k, d, d_dict, dtype):
    _, indices, rows, grad = case(batch, k, d, d_dict, dtype)
    found = sg.values_grad_triton(grad, indices, rows)
    assert found.dtype == dtype
    close(found, sg.values_grad_eager(grad, indices, rows), dtype)
    close(found, (grad.double() @ rows.double().T).gather(1, indices), dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("batch", "k", "d", "d_dict"), SHAPES)
def test_rows_grad(batch, k, d, d_dict, dtype):
    values, indices, _, grad = case(batch, k, d, d_dict, dtype)
    found = sg.rows_grad_triton(values, indices, grad, d_dict)
    assert found.dtype == torch.float32
    close(found, sg.rows_grad_eager(values, indices, grad, d_dict), torch.float32)
    close(found, dense(values, indices, d_dict).T @ grad.double(), torch.float32)


def test_int32_indices_and_strided_inputs():
    values, indices, rows, grad = case(5, 4, 12, 9, torch.float32)
    wide = torch.randn(5, 8, device=DEVICE)
    strided, tall, slanted = wide[:, ::2], rows.t().contiguous().t(), grad.t().contiguous().t()
    assert not (strided.is_contiguous() or tall.is_contiguous() or slanted.is_contiguous())
    codes = dense(strided, indices, 9)
    for index in (indices, indices.int(), indices.t().contiguous().t()):
        close(sd.decode_triton(strided, index, tall), codes @ rows.double(), torch.float32)
        close(
            sg.values_grad_triton(slanted, index, tall),
            (grad.double() @ rows.double().T).gather(1, indices),
            torch.float32,
        )
        close(sg.rows_grad_triton(strided, index, slanted, 9), codes.T @ grad.double(), torch.float32)


def test_a_hot_latent_and_unused_latents_are_summed_in_one_order():
    values, _, _, grad = case(40, 3, 6, 8, torch.float32)
    indices = torch.full((40, 3), 5, device=DEVICE)
    first = sg.rows_grad_triton(values, indices, grad, 8)
    assert torch.equal(first, sg.rows_grad_triton(values, indices, grad, 8))
    close(first, dense(values, indices, 8).T @ grad.double(), torch.float32)
    assert first[torch.arange(8) != 5].abs().max() == 0


@pytest.mark.parametrize("piece", [1, 2, 16, 256])
def test_long_segments_are_summed_in_pieces(piece):
    """One latent has 75 slots, one has exactly 16, one exactly 1, the rest none."""
    values, _, _, grad = case(46, 2, 70, 9, torch.float32)
    indices = torch.full((46, 2), 5, device=DEVICE)
    indices[10:18] = 2
    indices[30, 1] = 8
    segments = by_latent(indices, 9)
    cut = pieces(segments, piece)
    counts = segments.starts.diff()
    assert counts.tolist() == [0, 0, 16, 0, 0, 75, 0, 0, 1]
    assert cut.count.tolist() == [max(-(-c // piece), 1) for c in counts.tolist()]
    assert cut.owner[: int(cut.count.sum())].tolist() == torch.arange(9).repeat_interleave(cut.count.cpu()).tolist()
    assert (cut.owner[int(cut.count.sum()) :] == 9).all()
    assert int(cut.count[cut.count > 1].sum()) <= cut.n_spill
    found = sg.rows_grad_triton(values, indices, grad, 9, segments, piece)
    close(found, dense(values, indices, 9).T @ grad.double(), torch.float32)
    assert torch.equal(found, sg.rows_grad_triton(values, indices, grad, 9, None, piece))


def test_nothing_is_written_outside_the_output():
    """Rows of width 7 in blocks of 8: a missing mask would write into the next row or past the end."""
    values, indices, rows, grad = case(3, 2, 7, 5, torch.float32)
    nan = torch.full_like(rows, float("nan"))
    poisoned = torch.cat([rows, nan])  # rows past the dictionary must not be read
    assert torch.isfinite(sd.decode_triton(values, indices, poisoned)).all()
    close(sg.rows_grad_triton(values, indices, grad, 5), dense(values, indices, 5).T @ grad.double(), torch.float32)


def test_kernels_import_where_triton_is_absent():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from interp.kernels import dispatch, sparse_autograd, sparse_decode, topk_encode\n"
        "assert not dispatch.HAS_TRITON\n"
        "out = sparse_decode.decode(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.long), torch.ones(2, 3))\n"
        "assert out.tolist() == [[1.0, 1.0, 1.0]]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
