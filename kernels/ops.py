"""The sparse products as torch operators, so that autograd, `torch.compile` and autocast treat them as their own.

Three of them are the derivatives of one number, sum_{b,j} v[b, j] W[i[b, j]] . g[b]:
    sparse_decode       by g      x_hat[b] = sum_j v[b, j] W[i[b, j]]
    sparse_values_grad  by v      g[b] . W[i[b, j]]
    sparse_rows_grad    by W      sum of v[b, j] g[b] over i[b, j] = i
so each one's gradients are the other two, and derivatives of any order exist. `sparse_preactivations` returns numbers
that are known already, and gives them the gradient of x[b] . W_enc[:, i[b, j]] + b_enc[i[b, j]].

Autocast does not reach inside: sums stay float32, inputs of any mixture of types are read as they are.
Call these through `interp.kernels.sparse_autograd`.
"""

from typing import Any

import torch
from interp.kernels.dispatch import accumulator, plain
from interp.kernels.segments import Segments, by_latent
from interp.kernels.sparse_decode import decode
from interp.kernels.sparse_grad import latent_sums, rows_grad, values_grad
from torch import Tensor
from torch.library import custom_op

Gradients = tuple[Tensor | None, ...]


def given(slots: Tensor | None, starts: Tensor | None) -> Segments | None:
    return None if slots is None or starts is None else Segments(slots, starts)


@custom_op("interp::by_latent", mutates_args=())
def by_latent_op(indices: Tensor, d_dict: int) -> tuple[Tensor, Tensor]:
    return tuple(by_latent(indices, d_dict))  # pyright: ignore[reportReturnType]


@custom_op("interp::sparse_decode", mutates_args=())
def decode_op(
    values: Tensor, indices: Tensor, W_dec: Tensor, slots: Tensor | None = None, starts: Tensor | None = None
) -> Tensor:
    with plain(W_dec.device):
        return decode(values, indices, W_dec)


@custom_op("interp::sparse_values_grad", mutates_args=())
def values_grad_op(grad: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    with plain(W_dec.device):
        return values_grad(grad, indices, W_dec)


@custom_op("interp::sparse_rows_grad", mutates_args=())
def rows_grad_op(
    values: Tensor,
    indices: Tensor,
    grad: Tensor,
    d_dict: int,
    slots: Tensor | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    with plain(grad.device):
        return rows_grad(values, indices, grad, d_dict, given(slots, starts))


@custom_op("interp::sparse_latent_sums", mutates_args=())
def latent_sums_op(
    values: Tensor, indices: Tensor, d_dict: int, slots: Tensor | None = None, starts: Tensor | None = None
) -> Tensor:
    with plain(values.device):
        return latent_sums(values, indices, d_dict, given(slots, starts)).contiguous()


@custom_op("interp::sparse_preactivations", mutates_args=())
def preactivations_op(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    selected: Tensor,
    indices: Tensor,
    slots: Tensor | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    return selected.clone(memory_format=torch.contiguous_format)


# Shapes and types, for tracing


@by_latent_op.register_fake
def _(indices: Tensor, d_dict: int) -> tuple[Tensor, Tensor]:
    return indices.new_empty(indices.numel(), dtype=torch.int64), indices.new_empty(d_dict + 1, dtype=torch.int64)


@decode_op.register_fake
def _(
    values: Tensor, indices: Tensor, W_dec: Tensor, slots: Tensor | None = None, starts: Tensor | None = None
) -> Tensor:
    return W_dec.new_empty(values.shape[0], W_dec.shape[1])


@values_grad_op.register_fake
def _(grad: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    return W_dec.new_empty(indices.shape)


@rows_grad_op.register_fake
def _(
    values: Tensor,
    indices: Tensor,
    grad: Tensor,
    d_dict: int,
    slots: Tensor | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    return grad.new_empty(d_dict, grad.shape[1], dtype=accumulator(grad.dtype))


@latent_sums_op.register_fake
def _(
    values: Tensor, indices: Tensor, d_dict: int, slots: Tensor | None = None, starts: Tensor | None = None
) -> Tensor:
    return values.new_empty(d_dict, dtype=accumulator(values.dtype))


@preactivations_op.register_fake
def _(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    selected: Tensor,
    indices: Tensor,
    slots: Tensor | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    return selected.new_empty(selected.shape)


# Gradients


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the tensors, in their order; sizes are read off them."""
    ctx.save_for_backward(*(value for value in inputs if not isinstance(value, int)))


def _keep_preactivations(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, W_enc, b_enc, _, indices, slots, starts = inputs
    ctx.save_for_backward(x, W_enc, indices, slots, starts)
    ctx.types = (x.dtype, W_enc.dtype, b_enc.dtype)


def _decode_backward(ctx: Any, grad: Tensor) -> Gradients:
    values, indices, W_dec, slots, starts = ctx.saved_tensors
    to_values = to_rows = None
    if ctx.needs_input_grad[0]:
        to_values = values_grad_op(grad, indices, W_dec).to(values.dtype)
    if ctx.needs_input_grad[2]:
        to_rows = rows_grad_op(values, indices, grad, W_dec.shape[0], slots, starts).to(W_dec.dtype)
    return to_values, None, to_rows, None, None


def _values_grad_backward(ctx: Any, grad: Tensor) -> Gradients:
    upstream, indices, W_dec = ctx.saved_tensors
    to_upstream = to_rows = None
    if ctx.needs_input_grad[0]:
        to_upstream = decode_op(grad, indices, W_dec).to(upstream.dtype)
    if ctx.needs_input_grad[2]:
        to_rows = rows_grad_op(grad, indices, upstream, W_dec.shape[0]).to(W_dec.dtype)
    return to_upstream, None, to_rows


def _rows_grad_backward(ctx: Any, grad: Tensor) -> Gradients:
    values, indices, upstream, _, _ = ctx.saved_tensors
    to_values = to_upstream = None
    if ctx.needs_input_grad[0]:
        to_values = values_grad_op(upstream, indices, grad).to(values.dtype)
    if ctx.needs_input_grad[2]:
        to_upstream = decode_op(values, indices, grad).to(upstream.dtype)
    return to_values, None, to_upstream, None, None, None


def _latent_sums_backward(ctx: Any, grad: Tensor) -> Gradients:
    values, indices, _, _ = ctx.saved_tensors
    return grad[indices].to(values.dtype), None, None, None, None


def _preactivations_backward(ctx: Any, grad: Tensor) -> Gradients:
    x, W_enc, indices, slots, starts = ctx.saved_tensors
    to_x = to_W = to_b = None
    d_dict = W_enc.shape[1]
    if ctx.needs_input_grad[0]:
        to_x = decode_op(grad, indices, W_enc.t()).to(ctx.types[0])
    if ctx.needs_input_grad[1]:
        to_W = rows_grad_op(grad, indices, x, d_dict, slots, starts).to(ctx.types[1]).t()
    if ctx.needs_input_grad[2]:
        to_b = latent_sums_op(grad, indices, d_dict, slots, starts).to(ctx.types[2])
    return to_x, to_W, to_b, None, None, None, None


decode_op.register_autograd(_decode_backward, setup_context=_keep)
values_grad_op.register_autograd(_values_grad_backward, setup_context=_keep)
rows_grad_op.register_autograd(_rows_grad_backward, setup_context=_keep)
latent_sums_op.register_autograd(_latent_sums_backward, setup_context=_keep)
preactivations_op.register_autograd(_preactivations_backward, setup_context=_keep_preactivations)
