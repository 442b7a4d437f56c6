"""Sparse decode: x_hat[b] = sum_j values[b, j] * W_dec[indices[b, j]].

Axes: b (token), j (active latent, k of them), d (output coordinate). An index may occur twice in a row; its
contributions add. Sums are formed in float32 (float64 for float64) and returned in the dtype of W_dec.

Cost, s bytes per element: the gather reads B*k*d*s bytes, the output writes B*d*s; 2*B*k*d FLOP, so one FLOP per byte
and bound by memory. A dense decode does 2*B*m*d FLOP: m/k times as many.
After the decode kernels of L. Gao et al., 2024 (https://arxiv.org/abs/2406.04093); one program per token and block of
coordinates, so no two programs write the same number.
"""

import torch
from interp.kernels.dispatch import HAS_TRITON, accumulator, check_codes, use_triton
from torch import Tensor
from torch.nn import functional as F

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _decode_kernel(
        values, indices, rows, out,
        k, d,
        stride_vb, stride_vk, stride_ib, stride_ik, stride_wm, stride_wd,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        token = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < d
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for j in range(k):
            value = tl.load(values + token * stride_vb + j * stride_vk).to(tl.float32)
            row = tl.load(indices + token * stride_ib + j * stride_ik).to(tl.int64)
            weight = tl.load(rows + row * stride_wm + columns * stride_wd, mask=inside, other=0.0)
            total += value * weight.to(tl.float32)
        tl.store(out + token * d + columns, total.to(out.dtype.element_ty), mask=inside)


def decode_eager(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """The twin: values [batch, k], indices [batch, k], W_dec [d_dict, d] -> [batch, d], through `embedding_bag`."""
    check_codes(values, indices, W_dec.shape[0])
    if 0 in values.shape:  # embedding_bag refuses an empty batch; a sum over no latents is zero
        return W_dec.new_zeros(values.shape[0], W_dec.shape[1])
    dtype = accumulator(W_dec.dtype)
    summed = F.embedding_bag(indices, W_dec.to(dtype), per_sample_weights=values.to(dtype), mode="sum")
    return summed.to(W_dec.dtype)


def decode_triton(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """The kernel, with the twin's signature. Strides are free: nothing is copied."""
    check_codes(values, indices, W_dec.shape[0])
    (batch, k), d = values.shape, W_dec.shape[1]
    out = torch.empty(batch, d, dtype=W_dec.dtype, device=W_dec.device)
    if batch == 0 or d == 0:
        return out
    block = min(1024, triton.next_power_of_2(d))
    _decode_kernel[(batch, triton.cdiv(d, block))](
        values, indices, W_dec, out, k, d, *values.stride(), *indices.stride(), *W_dec.stride(), BLOCK=block
    )
    return out


def decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """x_hat[b] = sum_j values[b, j] * W_dec[indices[b, j]]; kernel on a GPU, twin elsewhere. Not differentiable:
    `interp.kernels.sparse_autograd.sparse_decode` is."""
    if use_triton(values, W_dec):
        return decode_triton(values, indices, W_dec)
    return decode_eager(values, indices, W_dec)
