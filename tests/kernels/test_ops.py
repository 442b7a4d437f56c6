"""The torch operators: first and second derivatives in float64, torch's own checks, compilation and autocast."""

from __future__ import annotations

import pytest
import torch
from interp.kernels.batch_encode import (
    batch_topk_encode,
    batch_topk_encode_op,
    groupmax_encode,
    groupmax_encode_op,
    threshold_encode,
    threshold_encode_op,
)
from interp.kernels.sparse_autograd import latent_segments, sparse_decode, sparse_encode, sparse_preactivations
from interp.kernels.topk_encode import preactivations, topk_encode, topk_encode_op

from interp.kernels import ops

BATCH, K, D, D_DICT = 4, 3, 5, 7


def tensors(dtype: torch.dtype = torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()  # noqa: E731
    indices = torch.randint(0, D_DICT - 1, (BATCH, K), generator=generator)  # duplicates; the last latent is unused
    return make(BATCH, K), indices, make(D_DICT, D), make(BATCH, D)


def parameters(dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, D, generator=generator, dtype=dtype)
    W_enc = torch.randn(D_DICT, D, generator=generator, dtype=dtype).t().requires_grad_()
    b_enc = torch.randn(D_DICT, generator=generator, dtype=dtype).requires_grad_()
    W_dec = torch.randn(D_DICT, D, generator=generator, dtype=dtype).requires_grad_()
    return x.requires_grad_(), W_enc, b_enc, W_dec


FUNCTIONS = {
    "decode": lambda v, i, W, g: (lambda v, W: ops.decode_op(v, i, W), (v, W)),
    "values_grad": lambda v, i, W, g: (lambda g, W: ops.values_grad_op(g, i, W), (g, W)),
    "rows_grad": lambda v, i, W, g: (lambda v, g: ops.rows_grad_op(v, i, g, D_DICT), (v, g)),
    "latent_sums": lambda v, i, W, g: (lambda v: ops.latent_sums_op(v, i, D_DICT), (v,)),
}


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_first_and_second_derivatives(name):
    function, inputs = FUNCTIONS[name](*tensors())
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("output", ["values", "pre-activations"])
def test_derivatives_of_every_output_of_encode(output, shared):
    x, W_enc, b_enc, _ = parameters(torch.float64)
    indices = topk_encode(x, W_enc, b_enc, 4)[1]
    segments = latent_segments(indices, D_DICT) if shared else None
    encode = sparse_encode if output == "values" else sparse_preactivations

    def function(x, W_enc, b_enc):
        return encode(x, W_enc, b_enc, (x @ W_enc + b_enc).gather(1, indices), indices, segments)

    out = function(x, W_enc, b_enc)
    assert (out <= 0).any() and (out > 1e-3).any()  # slots that the ReLU empties, and others
    assert torch.autograd.gradcheck(function, (x, W_enc, b_enc))
    assert torch.autograd.gradgradcheck(function, (x, W_enc, b_enc))


def test_gradient_of_a_preactivation_does_not_pass_a_relu():
    """A penalty on negative pre-activations must move the encoder (a fused encoder of the field drops it)."""
    x, W_enc, b_enc, _ = parameters(torch.float64)
    b_enc = (b_enc - 50).detach().requires_grad_()
    selected, indices = topk_encode(x, W_enc, b_enc, 2)
    assert (selected < 0).all()
    sparse_preactivations(x, W_enc, b_enc, selected, indices).sum().backward()
    expected = torch.zeros(D_DICT, D, dtype=torch.float64)
    for row in range(6):
        for latent in indices[row].tolist():
            expected[latent] += x[row].detach()
    torch.testing.assert_close(W_enc.grad, expected.t())
    torch.testing.assert_close(b_enc.grad, torch.bincount(indices.flatten(), minlength=D_DICT).double())


def test_segments_made_once_give_the_same_bits():
    values, indices, W_dec, grad = tensors(torch.float32)
    segments = latent_segments(indices, D_DICT)
    found = []
    for given in (None, segments):
        out = sparse_decode(values, indices, W_dec, given)
        found.append(torch.autograd.grad(out, (values, W_dec), grad.detach()))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


CALLS = {
    "by_latent": (ops.by_latent_op, lambda v, i, W, g: (i, D_DICT)),
    "decode": (ops.decode_op, lambda v, i, W, g: (v, i, W)),
    "values_grad": (ops.values_grad_op, lambda v, i, W, g: (g, i, W)),
    "rows_grad": (ops.rows_grad_op, lambda v, i, W, g: (v, i, g, D_DICT)),
    "rows_grad, segments": (ops.rows_grad_op, lambda v, i, W, g: (v, i, g, D_DICT, *ops.by_latent(i, D_DICT))),
    "latent_sums": (ops.latent_sums_op, lambda v, i, W, g: (v, i, D_DICT)),
    "preactivations": (ops.preactivations_op, lambda v, i, W, g: (g, W.detach().t().requires_grad_(), W[:, 0], v, i)),
    "topk": (topk_encode_op, lambda v, i, W, g: (g.detach(), W.detach().t(), W[:, 0].detach(), 2)),
    "groupmax": (groupmax_encode_op, lambda v, i, W, g: (g.detach(), W.detach().t(), W[:, 0].detach(), 1)),
    "batch_topk": (batch_topk_encode_op, lambda v, i, W, g: (g.detach(), W.detach().t(), W[:, 0].detach(), 5)),
    "threshold": (
        threshold_encode_op,
        lambda v, i, W, g: (g.detach(), W.detach().t(), W[:, 0].detach(), torch.tensor(0.5)),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list(CALLS))
def test_torch_accepts_the_operator(name, dtype):
    """Schema, aliasing, fake tensors and autograd registration, by torch.library.opcheck."""
    op, arguments = CALLS[name]
    values, indices, W_dec, grad = tensors(dtype)
    torch.library.opcheck(op, arguments(values, indices, W_dec, grad))


def autoencode(x, W_enc, b_enc, W_dec, segmented=False):
    selected, indices = topk_encode(x, W_enc, b_enc, K)
    segments = latent_segments(indices, D_DICT) if segmented else None
    values = sparse_encode(x, W_enc, b_enc, selected, indices, segments)
    return sparse_decode(values, indices, W_dec, segments) + selected.sum()


@pytest.mark.parametrize("segmented", [False, True])
def test_a_compiled_autoencoder_has_the_values_and_gradients_of_the_plain_one(segmented):
    inputs = parameters()
    compiled = torch.compile(autoencode, fullgraph=True, backend="aot_eager")
    found = []
    for function in (autoencode, compiled):
        out = function(*inputs, segmented)
        found.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["batch", "threshold", "groupmax"])
def test_the_other_selections_compile(kind):
    def autoencode(x, W_enc, b_enc, W_dec):
        if kind == "batch":
            selected, indices, _ = batch_topk_encode(x, W_enc, b_enc, 9)
        elif kind == "threshold":
            selected, indices = threshold_encode(x, W_enc, b_enc, 0.25)
        else:
            selected, indices = groupmax_encode(x, W_enc, b_enc, 1)
        return sparse_decode(sparse_encode(x, W_enc, b_enc, selected, indices), indices, W_dec)

    inputs = parameters()
    compiled = torch.compile(autoencode, fullgraph=True, backend="aot_eager")
    found = []
    for function in (autoencode, compiled):
        out = function(*inputs)
        found.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("buffered", [False, True])
def test_under_autocast_on_a_cpu_nothing_is_lowered(buffered):
    inputs = parameters()
    plain = autoencode(*inputs)
    gradients = torch.autograd.grad(plain.square().sum(), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = autoencode(*inputs)
        buffer = torch.empty(6, D_DICT) if buffered else None
        z = preactivations(*inputs[:3], buffer) if not buffered else None
        values, _ = topk_encode(*inputs[:3], 2, buffer)
    assert found.dtype == values.dtype == torch.float32 and (z is None or z.dtype == torch.float32)
    assert torch.equal(found, plain)
    for ours, theirs in zip(torch.autograd.grad(found.square().sum(), inputs), gradients, strict=True):
        assert torch.equal(ours, theirs)


def test_under_autocast_low_precision_activations_meet_float32_weights():
    """What a layer under autocast hands over is bfloat16; the master weights are float32."""
    x, W_enc, b_enc, W_dec = parameters()
    lowered = x.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = autoencode(lowered, W_enc, b_enc, W_dec)
    reference = autoencode(lowered.detach().float(), W_enc, b_enc, W_dec)
    torch.testing.assert_close(found, reference)
    gradients = torch.autograd.grad(found.square().sum(), (lowered, W_enc, b_enc, W_dec))
    assert [g.dtype for g in gradients] == [torch.bfloat16] + 3 * [torch.float32]
    assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in gradients)


def test_compiled_under_autocast():
    inputs = parameters()

    def run(*inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return autoencode(*inputs)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), autoencode(*inputs))
