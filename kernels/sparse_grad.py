"""Gradients of the sparse decode, through the active latents only.

To the values, a sampled dense-dense product:   dvalues[b, j] = grad[b] . W_dec[indices[b, j]].
To the rows, a transposed sparse product:       dW[i] = sum over {(b, j): indices[b, j] = i} of values[b, j] * grad[b].

The row gradient sorts the B*k indices (stable), which gives one segment per latent, and sums each segment in one
program (one bag in the twin): no atomics, so two runs are bitwise equal; sums in float32 (float64 for float64);
a latent that was never used gets a row of zeros. The same function gives the encoder's gradient, with the encoder's
input in place of `grad` and the gradient of the pre-activations in place of `values`.

Cost, s bytes per element: values read B*k*d*s + B*d*s; rows gather B*k*d*s, write m*d*4, and sort B*k keys.
A dense backward does 2*B*m*d FLOP for each. A latent that fires on a large part of the batch serialises its program.
After L. Gao et al., 2024 (https://arxiv.org/abs/2406.04093) and EleutherAI's sparsify, without their atomics.
"""

import torch
from interp.kernels.dispatch import HAS_TRITON, accumulator, check_codes, use_triton
from interp.kernels.sampled import sampled_product
from torch import Tensor
from torch.nn import functional as F

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _values_kernel(
        grad, indices, rows, out,
        k, d,
        stride_gb, stride_gd, stride_ib, stride_ik, stride_wm, stride_wd,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        token = tl.program_id(0).to(tl.int64)
        j = tl.program_id(1)
        row = tl.load(indices + token * stride_ib + j * stride_ik).to(tl.int64)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, d, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < d
            upstream = tl.load(grad + token * stride_gb + columns * stride_gd, mask=inside, other=0.0)
            weight = tl.load(rows + row * stride_wm + columns * stride_wd, mask=inside, other=0.0)
            total += upstream.to(tl.float32) * weight.to(tl.float32)
        tl.store(out + token * k + j, tl.sum(total, axis=0).to(out.dtype.element_ty))

    @triton.jit
    def _rows_kernel(
        weights, tokens, starts, grad, out,
        d,
        stride_gb, stride_gd,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        latent = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < d
        first = tl.load(starts + latent)
        last = tl.load(starts + latent + 1)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for position in range(first, last):
            weight = tl.load(weights + position).to(tl.float32)
            token = tl.load(tokens + position).to(tl.int64)
            upstream = tl.load(grad + token * stride_gb + columns * stride_gd, mask=inside, other=0.0)
            total += weight * upstream.to(tl.float32)
        tl.store(out + latent * d + columns, total, mask=inside)


def by_latent(values: Tensor, indices: Tensor, d_dict: int) -> tuple[Tensor, Tensor, Tensor]:
    """CSR of the transposed codes: (weights, token numbers, segment starts [d_dict + 1]), latents in order and the
    tokens of one latent in order of appearance (the sort is stable, so the sums have one order)."""
    keys, order = indices.reshape(-1).sort(stable=True)
    latents = torch.arange(d_dict + 1, device=indices.device, dtype=keys.dtype)
    starts = torch.searchsorted(keys, latents)
    return values.reshape(-1)[order], order // max(indices.shape[1], 1), starts


def values_grad_eager(grad: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """The twin: grad [batch, d], indices [batch, k], W_dec [d_dict, d] -> [batch, k].

    A sampled product: neither the [batch, k, d] gather nor the [batch, d_dict] dense product is formed.
    """
    check_codes(indices, indices, W_dec.shape[0])
    if indices.numel() == 0:
        return W_dec.new_zeros(indices.shape)
    dtype, (batch, k) = accumulator(W_dec.dtype), indices.shape
    starts = torch.arange(0, batch * k + 1, k, device=indices.device)
    sampled = sampled_product(grad.detach().to(dtype), W_dec.detach().to(dtype), starts, indices.reshape(-1))
    return sampled.view(batch, k).to(W_dec.dtype)


def rows_grad_eager(values: Tensor, indices: Tensor, grad: Tensor, d_dict: int) -> Tensor:
    """The twin: values [batch, k], indices [batch, k], grad [batch, d] -> [d_dict, d], float32 or float64.

    One bag per latent over the rows of `grad`; an empty bag is a row of zeros.
    """
    check_codes(values, indices, d_dict)
    dtype = accumulator(grad.dtype)
    if indices.numel() == 0 or d_dict == 0:
        return torch.zeros(d_dict, grad.shape[1], dtype=dtype, device=grad.device)
    weights, tokens, starts = by_latent(values, indices, d_dict)
    return F.embedding_bag(
        tokens, grad.to(dtype), starts.to(tokens.dtype), mode="sum", per_sample_weights=weights.to(dtype),
        include_last_offset=True,
    )  # fmt: skip


def values_grad_triton(grad: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """The kernel, with the twin's signature."""
    check_codes(indices, indices, W_dec.shape[0])
    (batch, k), d = indices.shape, W_dec.shape[1]
    out = torch.empty(batch, k, dtype=W_dec.dtype, device=W_dec.device)
    if out.numel() == 0:
        return out
    block = min(1024, triton.next_power_of_2(max(d, 1)))
    _values_kernel[(batch, k)](
        grad, indices, W_dec, out, k, d, *grad.stride(), *indices.stride(), *W_dec.stride(), BLOCK=block
    )
    return out


def rows_grad_triton(values: Tensor, indices: Tensor, grad: Tensor, d_dict: int) -> Tensor:
    """The kernel, with the twin's signature."""
    check_codes(values, indices, d_dict)
    d = grad.shape[1]
    out = torch.empty(d_dict, d, dtype=torch.float32, device=grad.device)
    if out.numel() == 0:
        return out
    weights, tokens, starts = by_latent(values, indices, d_dict)
    block = min(1024, triton.next_power_of_2(d))
    _rows_kernel[(d_dict, triton.cdiv(d, block))](weights, tokens, starts, grad, out, d, *grad.stride(), BLOCK=block)
    return out


def values_grad(grad: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """dvalues[b, j] = grad[b] . W_dec[indices[b, j]]; kernel on a GPU, twin elsewhere."""
    if use_triton(grad, W_dec):
        return values_grad_triton(grad, indices, W_dec)
    return values_grad_eager(grad, indices, W_dec)


def latent_sums(values: Tensor, indices: Tensor, d_dict: int) -> Tensor:
    """sums[i] = sum of values[b, j] over indices[b, j] = i: the gradient of a bias, [d_dict], float32 or float64.

    `index_add_` has one order on a CPU; on a GPU it would use atomics, so the row kernel runs on a column of ones.
    """
    dtype = accumulator(values.dtype)
    if values.is_cuda:
        ones = torch.ones(values.shape[0], 1, dtype=values.dtype, device=values.device)
        return rows_grad(values, indices, ones, d_dict)[:, 0]
    sums = torch.zeros(d_dict, dtype=dtype, device=values.device)
    return sums.index_add_(0, indices.reshape(-1), values.reshape(-1).to(dtype))


def rows_grad(values: Tensor, indices: Tensor, grad: Tensor, d_dict: int) -> Tensor:
    """dW[i] = sum of values[b, j] * grad[b] over indices[b, j] = i; kernel on a GPU, twin elsewhere."""
    if use_triton(values, grad):
        return rows_grad_triton(values, indices, grad, d_dict)
    return rows_grad_eager(values, indices, grad, d_dict)
