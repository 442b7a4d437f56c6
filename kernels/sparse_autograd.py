"""The top-k autoencoder's two differentiable pieces, with sparse gradients.

`sparse_encode`: values[b, j] = relu(x[b] . W_enc[:, indices[b, j]] + b_enc[indices[b, j]]) at given indices, whose
pre-activations were already computed to select them.
`sparse_decode`: x_hat[b] = sum_j values[b, j] W_dec[indices[b, j]].

Gradients reach only the selected latents, and of those only the ones that the ReLU left positive: a selected slot whose
value is zero sends nothing back, as in the dense reference. (EleutherAI's fused encoder lets it through, and drops the
gradient of its pre-activations; both are easy to write and invisible in the loss.)
Indices are constants: the selection itself has no gradient.
"""

from typing import Any

import torch
from interp.kernels.sparse_decode import decode
from interp.kernels.sparse_grad import latent_sums, rows_grad, values_grad
from torch import Tensor


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices, W_dec)
        return decode(values, indices, W_dec)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        values, indices, W_dec = ctx.saved_tensors
        grad = grads[0]
        to_values = values_grad(grad, indices, W_dec).to(values.dtype) if ctx.needs_input_grad[0] else None
        to_rows = rows_grad(values, indices, grad, W_dec.shape[0]).to(W_dec.dtype) if ctx.needs_input_grad[2] else None
        return to_values, None, to_rows


class _SparseEncode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, selected: Tensor, indices: Tensor) -> Tensor:
        values = selected.relu()
        ctx.save_for_backward(x, W_enc, values, indices)
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, W_enc, values, indices = ctx.saved_tensors
        grad = grads[0] * (values > 0)
        d_dict = W_enc.shape[1]
        to_x = to_W = to_b = None
        if ctx.needs_input_grad[0]:
            to_x = decode(grad, indices, W_enc.t()).to(x.dtype)
        if ctx.needs_input_grad[1]:
            to_W = rows_grad(grad, indices, x, d_dict).to(W_enc.dtype).t()
        if ctx.needs_input_grad[2]:
            to_b = latent_sums(grad, indices, d_dict).to(W_enc.dtype)
        return to_x, to_W, to_b, None, None


def sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """x_hat[b] = sum_j values[b, j] * W_dec[indices[b, j]]; differentiable in values and W_dec."""
    out = _SparseDecode.apply(values, indices, W_dec)
    assert isinstance(out, Tensor)
    return out


def sparse_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, selected: Tensor, indices: Tensor) -> Tensor:
    """relu(selected), where `selected` are x's pre-activations at `indices`; differentiable in x, W_enc and b_enc.

    W_enc is cheapest stored column by column (`W_enc.t()` contiguous): its gradient comes that way.
    """
    out = _SparseEncode.apply(x, W_enc, b_enc, selected.detach(), indices)
    assert isinstance(out, Tensor)
    return out
