"""The differentiable pieces: gradcheck in float64 on every output, and a dense autograd reference with its ReLU."""

from __future__ import annotations

import pytest
import torch
from interp.kernels.segments import by_latent
from interp.kernels.sparse_autograd import sparse_decode, sparse_encode
from interp.kernels.sparse_decode import decode, decode_eager
from interp.kernels.sparse_grad import rows_grad_eager, values_grad_eager
from interp.kernels.topk_encode import preactivations, topk_encode

BATCH, D, D_DICT, K = 17, 24, 64, 5


def weights(seed: int = 0, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, D, generator=generator, dtype=dtype)
    W_enc = torch.randn(D, D_DICT, generator=generator, dtype=dtype)
    W_dec = torch.randn(D_DICT, D, generator=generator, dtype=dtype)
    b_enc = torch.randn(D_DICT, generator=generator, dtype=dtype)
    b_enc[3] += 40.0  # a hot latent: every token selects it
    b_enc[7] -= 400.0  # an unused one
    return x, W_enc, b_enc, W_dec


def sparse(x, W_enc, b_enc, W_dec, k=K):
    with torch.no_grad():
        selected, indices = topk_encode(x, W_enc, b_enc, k)
    values = sparse_encode(x, W_enc, b_enc, selected, indices)
    return values, indices, sparse_decode(values, indices, W_dec)


def dense(x, W_enc, b_enc, W_dec, k=K):
    """The reference: a masked dense autoencoder under plain autograd."""
    z = x @ W_enc + b_enc
    mask = torch.zeros_like(z).scatter_(1, z.topk(k, dim=1).indices, 1.0)
    return (z * mask).relu() @ W_dec


def gradients(function, tensors):
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    generator = torch.Generator().manual_seed(9)
    (out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum().backward()
    return out.detach(), [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("k", [1, K, D_DICT])
def test_value_and_all_four_gradients_equal_dense_autograd(k):
    tensors = weights()
    tensors[2][20:] -= 6.0  # most latents rarely positive, so that top-k selects negative pre-activations
    tensors[1][0] = 1.0
    tensors[0][11, 0] = -1000.0  # a row without a positive pre-activation
    assert (tensors[0] @ tensors[1] + tensors[2])[11].max() < 0
    out, found = gradients(lambda *t: sparse(*t, k=k)[2], tensors)
    reference, expected = gradients(lambda *t: dense(*t, k=k), tensors)
    torch.testing.assert_close(out, reference, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-10)
    assert found[1][:, 7].abs().max() == 0 and found[2][7] == 0  # never above zero
    assert found[3][3].abs().max() > 0
    assert found[0][11].abs().max() == 0


def test_slots_that_the_relu_emptied_send_no_gradient():
    x, W_enc, b_enc, W_dec = weights()
    b_enc = b_enc - 1000.0  # every pre-activation negative: top-k selects, the ReLU empties
    _, found = gradients(lambda *t: sparse(*t)[2], (x, W_enc, b_enc, W_dec))
    assert all(float(g.abs().max()) == 0 for g in found)


@pytest.mark.parametrize("strided", [False, True])
def test_gradcheck_of_encode(strided):
    x, W_enc, b_enc, _ = weights(1)
    x, W_enc, b_enc = x[:4], W_enc[:, :9], b_enc[:9]
    if strided:
        x, W_enc = x.t().contiguous().t(), W_enc.t().contiguous().t()
    indices = topk_encode(x, W_enc, b_enc, 4)[1]

    def values(x, W_enc, b_enc):
        return sparse_encode(x, W_enc, b_enc, (x @ W_enc + b_enc).gather(1, indices), indices)

    leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, W_enc, b_enc)]
    assert values(*leaves).abs().min() > 1e-4 or (values(*leaves) == 0).any()  # away from the kink, or exactly past it
    assert torch.autograd.gradcheck(values, leaves, atol=1e-7)


@pytest.mark.parametrize("duplicates", [False, True])
def test_gradcheck_of_decode(duplicates):
    generator = torch.Generator().manual_seed(2)
    indices = torch.randint(0, 3 if duplicates else 40, (5, 4), generator=generator)
    values = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    values[0, 0] = 0.0  # linear in the values: a zero is no kink here
    rows = torch.randn(40, 7, generator=generator, dtype=torch.float64)
    leaves = (values.requires_grad_(), rows.requires_grad_())
    assert torch.autograd.gradcheck(lambda v, w: sparse_decode(v, indices, w), leaves)


def test_encode_gradient_reaches_every_output_slot():
    """A loss on one slot alone must move exactly that slot's latent (a fused encoder of the field drops this)."""
    x, W_enc, b_enc, _ = weights()
    W_enc.requires_grad_()
    selected, indices = topk_encode(x, W_enc.detach(), b_enc, K)
    values = sparse_encode(x, W_enc, b_enc, selected, indices)
    row, slot = (values > 0).nonzero()[5].tolist()
    values[row, slot].backward()
    expected = torch.zeros_like(W_enc)
    expected[:, indices[row, slot]] = x[row]
    torch.testing.assert_close(W_enc.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_twins_in_low_precision_sum_in_float32(dtype):
    generator = torch.Generator().manual_seed(3)
    values = torch.ones(1, 4096, dtype=dtype)  # 4096 equal terms: a bfloat16 sum would stop growing at 256
    indices = torch.zeros(1, 4096, dtype=torch.long)
    rows = torch.ones(1, 3, dtype=dtype)
    assert decode_eager(values, indices, rows).tolist() == [[4096.0] * 3]
    tall = torch.zeros(4096, 1, dtype=torch.long)
    assert rows_grad_eager(values.t(), tall, torch.ones(4096, 3, dtype=dtype), 1).tolist() == [[4096.0] * 3]
    wide = torch.ones(1, 4096, dtype=dtype)
    assert values_grad_eager(wide, torch.zeros(1, 2, dtype=torch.long), wide).tolist() == [[4096.0] * 2]
    x = torch.randn(3, 8, generator=generator).to(dtype).requires_grad_()
    W = torch.randn(8, 6, generator=generator).to(dtype).requires_grad_()
    out = sparse(x, W, torch.zeros(6, dtype=dtype), torch.randn(6, 8, generator=generator).to(dtype), k=2)[2]
    out.sum().backward()
    assert x.grad.dtype == W.grad.dtype == out.dtype == dtype


def test_empty_batch_and_no_latent():
    x, W_enc, b_enc, W_dec = weights()
    leaves = [t.requires_grad_() for t in (x[:0], W_enc, b_enc, W_dec)]
    values, _, out = sparse(*leaves)
    assert values.shape == (0, K) and out.shape == (0, D)
    out.sum().backward()
    assert all(float(t.grad.abs().sum()) == 0 for t in leaves)
    none = torch.zeros(3, 0, dtype=torch.long)
    assert decode(torch.zeros(3, 0), none, W_dec.detach().float()).abs().sum() == 0
    assert rows_grad_eager(torch.zeros(3, 0), none, torch.ones(3, D), D_DICT).abs().sum() == 0


def test_segments_hold_the_slots_of_each_latent_in_order():
    indices = torch.tensor([[2, 0], [2, 2], [0, 4]])
    slots, starts = by_latent(indices, 5)
    assert starts.tolist() == [0, 2, 2, 5, 5, 6]
    assert slots.tolist() == [1, 4, 0, 2, 3, 5]


def test_topk_is_exact_on_ties_and_reuses_its_buffer():
    x = torch.eye(3)
    W_enc = torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [-1.0, -2.0, -3.0, -4.0]])
    buffer = torch.full((5, 4), float("nan"))
    values, indices = topk_encode(x, W_enc, torch.zeros(4), 2, buffer)
    assert values.sort(descending=True).values.tolist() == [[1.0, 1.0], [0.0, 0.0], [-1.0, -2.0]]
    assert all(len(set(row)) == 2 for row in indices.tolist())  # ties never select one latent twice
    assert torch.equal(buffer[:3], x @ W_enc) and buffer[3:].isnan().all()
    assert torch.equal(values, topk_encode(x, W_enc, torch.zeros(4), 2)[0])
    assert preactivations(x, W_enc, torch.zeros(4), buffer).data_ptr() == buffer.data_ptr()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, W, b: topk_encode(x, W, b, 65), "k=65 is not in 1..d_dict=64"),
        (lambda x, W, b: topk_encode(x, W, b, 0), "k=0"),
        (lambda x, W, b: topk_encode(x, W, b, 2, torch.zeros(3, 64, dtype=x.dtype)), "buffer"),
        (lambda x, W, b: decode(x, torch.zeros(2, 2, dtype=torch.long), W), "must both be"),
        (lambda x, W, b: decode(x, torch.zeros_like(x), W), "expected int32 or int64"),
    ],
)
def test_bad_input_is_named(call, message):
    x, W_enc, b_enc, _ = weights()
    with pytest.raises(ValueError, match=message):
        call(x, W_enc, b_enc)
