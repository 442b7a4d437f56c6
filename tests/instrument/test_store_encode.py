"""int8: every value within half a step of its row's scale, for any input of any kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from interp.instrument import store_encode
from interp.instrument.store_encode import dequantise, quantise


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (300, 3), (2, 1000), (0, 4), (4, 0)])
def test_quantised_rows_are_within_half_a_step(dtype, shape, monkeypatch):
    monkeypatch.setattr(store_encode, "BLOCK_NUMBERS", 64)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype) * 10
    before = x.clone()
    q, scale = quantise(x)
    assert torch.equal(x, before) and q.dtype == torch.int8 and scale.shape == (shape[0],)
    exact = x.double().numpy()
    step = np.abs(exact).max(axis=1, initial=0.0) / 127
    error = np.abs(dequantise(q, scale).double().numpy() - exact)
    assert bool((error <= step[:, None] * 0.50001).all())
    if x.numel():
        assert int(q.abs().amax(dim=1).min()) == 127  # the largest of each row takes the last step


def test_rows_of_zeros_and_of_the_smallest_numbers_come_back_as_zeros():
    x = torch.tensor([[0.0, 0.0], [1e-44, -1e-45], [127.0, -63.5]])
    assert dequantise(*quantise(x)).tolist() == [[0.0, 0.0], [0.0, 0.0], [127.0, -64.0]]


def test_axes_beyond_the_first_keep_their_shape():
    q, scale = quantise(torch.arange(24.0).view(2, 12))
    assert torch.equal(dequantise(q.view(2, 3, 4), scale).flatten(1), dequantise(q, scale))
