"""Gradients of the sparse decode, through the active latents only.

To the values, a sampled dense-dense product:   dvalues[b, j] = grad[b] . W_dec[indices[b, j]].
To the rows, a transposed sparse product:       dW[i] = sum over {(b, j): indices[b, j] = i} of values[b, j] * grad[b].

The row gradient orders the B*k slots by latent (`interp.kernels.segments`) and sums each segment in one program, long
segments in pieces whose sums are then added in order: no atomics, so two runs are bitwise equal. Sums are float32
(float64 for float64); a latent that was never used gets a row of zeros. The same function gives the encoder's
gradient, with the encoder's input in place of `grad` and the gradient of the pre-activations in place of `values`.

Cost, s bytes per element: values read B*k*d*s + B*d*s; rows gather B*k*d*s, write m*d*4, and sort B*k keys.
A dense backward does 2*B*m*d FLOP for each. Programs of one block of columns run together, so the [B, block] part of
`grad` can stay in the second-level cache.
After L. Gao et al., 2024 (https://arxiv.org/abs/2406.04093) and EleutherAI's sparsify, without their atomics.
"""

import torch
from interp.kernels.dispatch import HAS_TRITON, accumulator, check_codes, use_triton
from interp.kernels.sampled import sampled_product
from interp.kernels.segments import PIECE, Segments, by_latent, pieces
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
        SLOTS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        token = tl.program_id(0).to(tl.int64)
        slots = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
        there = slots < k
        row = tl.load(indices + token * stride_ib + slots * stride_ik, mask=there, other=0).to(tl.int64)
        total = tl.zeros((SLOTS, BLOCK), dtype=tl.float32)
        for start in range(0, d, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < d
            upstream = tl.load(grad + token * stride_gb + columns * stride_gd, mask=inside, other=0.0)
            weight = tl.load(
                rows + row[:, None] * stride_wm + columns[None, :] * stride_wd,
                mask=there[:, None] & inside[None, :], other=0.0,
            )  # fmt: skip
            total += upstream.to(tl.float32)[None, :] * weight.to(tl.float32)
        tl.store(out + token * k + slots, tl.sum(total, axis=1).to(out.dtype.element_ty), mask=there)

    @triton.jit
    def _pieces_kernel(
        values, slots, starts, owner, first, count, spill_row, grad, out, spill,
        k, d, d_dict,
        stride_vb, stride_vk, stride_gb, stride_gd,
        PIECE: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        piece = tl.program_id(0)
        latent = tl.load(owner + piece).to(tl.int64)
        if latent < d_dict:
            columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
            inside = columns < d
            part = piece - tl.load(first + latent)
            begin = tl.load(starts + latent) + part * PIECE
            end = tl.minimum(begin + PIECE, tl.load(starts + latent + 1))
            total = tl.zeros((BLOCK,), dtype=tl.float32)
            for position in range(begin, end):
                slot = tl.load(slots + position).to(tl.int64)
                token, j = slot // k, slot % k
                weight = tl.load(values + token * stride_vb + j * stride_vk).to(tl.float32)
                upstream = tl.load(grad + token * stride_gb + columns * stride_gd, mask=inside, other=0.0)
                total += weight * upstream.to(tl.float32)
            if tl.load(count + latent) == 1:
                tl.store(out + latent * d + columns, total, mask=inside)
            else:
                where = tl.load(spill_row + latent) + part
                tl.store(spill + where * d + columns, total, mask=inside)

    @triton.jit
    def _gather_pieces_kernel(count, spill_row, spill, out, d, BLOCK: tl.constexpr):
        latent = tl.program_id(0).to(tl.int64)
        n_pieces = tl.load(count + latent)
        if n_pieces > 1:
            columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
            inside = columns < d
            begin = tl.load(spill_row + latent)
            total = tl.zeros((BLOCK,), dtype=tl.float32)
            for piece in range(begin, begin + n_pieces):
                total += tl.load(spill + piece * d + columns, mask=inside, other=0.0)
            tl.store(out + latent * d + columns, total, mask=inside)


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


def rows_grad_eager(
    values: Tensor, indices: Tensor, grad: Tensor, d_dict: int, segments: Segments | None = None
) -> Tensor:
    """The twin: values [batch, k], indices [batch, k], grad [batch, d] -> [d_dict, d], float32 or float64.

    One bag per latent over the rows of `grad`; an empty bag is a row of zeros.
    """
    check_codes(values, indices, d_dict)
    dtype = accumulator(grad.dtype)
    if indices.numel() == 0 or d_dict == 0:
        return torch.zeros(d_dict, grad.shape[1], dtype=dtype, device=grad.device)
    slots, starts = segments or by_latent(indices, d_dict)
    return F.embedding_bag(
        slots // indices.shape[1], grad.to(dtype), starts.to(slots.dtype), mode="sum",
        per_sample_weights=values.reshape(-1)[slots].to(dtype), include_last_offset=True,
    )  # fmt: skip


def values_grad_triton(grad: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """The kernel, with the twin's signature."""
    check_codes(indices, indices, W_dec.shape[0])
    (batch, k), d = indices.shape, W_dec.shape[1]
    out = torch.empty(batch, k, dtype=W_dec.dtype, device=W_dec.device)
    if out.numel() == 0:
        return out
    slots, block = min(8, triton.next_power_of_2(k)), min(512, triton.next_power_of_2(max(d, 1)))
    _values_kernel[(batch, triton.cdiv(k, slots))](
        grad, indices, W_dec, out, k, d, *grad.stride(), *indices.stride(), *W_dec.stride(), SLOTS=slots, BLOCK=block
    )
    return out


def rows_grad_triton(
    values: Tensor, indices: Tensor, grad: Tensor, d_dict: int, segments: Segments | None = None, piece: int = PIECE
) -> Tensor:
    """The kernels, with the twin's signature; `piece` slots are summed in sequence."""
    check_codes(values, indices, d_dict)
    d = grad.shape[1]
    out = torch.empty(d_dict, d, dtype=torch.float32, device=grad.device)
    if out.numel() == 0:
        return out
    if indices.numel() == 0:
        return out.zero_()
    segments = segments or by_latent(indices, d_dict)
    cut = pieces(segments, piece)
    spill = torch.empty(cut.n_spill, d, dtype=torch.float32, device=grad.device)
    block = min(1024, triton.next_power_of_2(d))
    columns = triton.cdiv(d, block)
    _pieces_kernel[(len(cut.owner), columns)](
        values, segments.slots, segments.starts, cut.owner, cut.first, cut.count, cut.spill, grad, out, spill,
        indices.shape[1], d, d_dict, *values.stride(), *grad.stride(), PIECE=piece, BLOCK=block,
    )  # fmt: skip
    _gather_pieces_kernel[(d_dict, columns)](cut.count, cut.spill, spill, out, d, BLOCK=block)
    return out


def values_grad(grad: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """dvalues[b, j] = grad[b] . W_dec[indices[b, j]]; kernel on a GPU, twin elsewhere."""
    if use_triton(grad, W_dec):
        return values_grad_triton(grad, indices, W_dec)
    return values_grad_eager(grad, indices, W_dec)


def rows_grad(values: Tensor, indices: Tensor, grad: Tensor, d_dict: int, segments: Segments | None = None) -> Tensor:
    """dW[i] = sum of values[b, j] * grad[b] over indices[b, j] = i; kernel on a GPU, twin elsewhere."""
    if use_triton(values, grad):
        return rows_grad_triton(values, indices, grad, d_dict, segments)
    return rows_grad_eager(values, indices, grad, d_dict, segments)


def latent_sums(values: Tensor, indices: Tensor, d_dict: int, segments: Segments | None = None) -> Tensor:
    """sums[i] = sum of values[b, j] over indices[b, j] = i: the gradient of a bias, [d_dict], float32 or float64.

    `index_add_` has one order on a CPU; on a GPU it would use atomics, so the row kernel runs on a column of ones.
    """
    dtype = accumulator(values.dtype)
    if values.is_cuda:
        ones = torch.ones(values.shape[0], 1, dtype=values.dtype, device=values.device)
        return rows_grad(values, indices, ones, d_dict, segments)[:, 0]
    sums = torch.zeros(d_dict, dtype=dtype, device=values.device)
    return sums.index_add_(0, indices.reshape(-1), values.reshape(-1).to(dtype))
