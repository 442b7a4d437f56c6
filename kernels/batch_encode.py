"""Selections that give every token its own number of latents, or one latent per group.

    batch top-k   the k_total largest positive pre-activations of the whole batch
    threshold     all z[b, j] > theta[j]
    group-max     the largest of each of k groups of d_dict / k consecutive latents

The first two return as many slots as the fullest row needs, in order of the latents; spare slots hold the value 0 and
latent 0. All are exact and return constants: gradients come from `interp.kernels.sparse_autograd`.
The functions ending in _eager are the specification. On a CPU that multiplies bfloat16 natively, float32 inputs are
selected by the bounds of `interp.kernels.bounds`, as in `interp.kernels.certified`:
    threshold     candidates are those whose bound on z - theta is positive: they hold every answer by construction
    batch top-k   candidates reach t; certified if the k_total-th largest of their exact values does too, else again
                  with that value as t
Papers: B. Bussmann et al., BatchTopK sparse autoencoders, 2024, https://arxiv.org/abs/2412.06410; the group-max of
EleutherAI's sparsify.
"""

from typing import Any

import torch
from interp.kernels.bounds import lower_encoder, upper_bounds
from interp.kernels.certified import CHUNK_BYTES, candidates, suits
from interp.kernels.dispatch import one_type, plain
from interp.kernels.sampled import sampled_product
from interp.kernels.topk_encode import preactivations
from interp.kernels.workspace import Workspace
from torch import Tensor
from torch.library import custom_op, get_ctx
from torch.nn import functional as F

Buffer = Tensor | Workspace | None
Entries = tuple[Tensor, Tensor, Tensor]
"""values, latents and starts [batch + 1] of a CSR matrix."""

MOST = 16
"""Above one candidate in this many latents, the dense product is taken."""


def padded(values: Tensor, latents: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """CSR entries in as many slots as the fullest row needs."""
    counts = starts.diff()
    batch = len(counts)
    slots = int(counts.max()) if batch else 0
    rows = torch.repeat_interleave(torch.arange(batch, device=values.device), counts, output_size=len(values))
    place = torch.arange(len(values), device=values.device) + (rows * slots - starts[:-1][rows])
    selected, indices = values.new_zeros(batch * slots), latents.new_zeros(batch * slots)
    selected[place], indices[place] = values, latents
    return selected.view(batch, slots), indices.view(batch, slots)


def entries(z: Tensor, chosen: Tensor) -> Entries:
    rows, latents = chosen.nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=z.shape[0])
    return z[rows, latents], latents, F.pad(counts.cumsum(0), (1, 0))


def kept(found: Entries, chosen: Tensor) -> Entries:
    """The entries where `chosen` is true."""
    values, latents, starts = found
    before = F.pad(chosen.cumsum(0), (1, 0))
    return values[chosen], latents[chosen], before[starts]


# The specifications


@torch.no_grad()
def batch_topk_encode_eager(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k_total: int, buffer: Buffer = None
) -> tuple[Tensor, Tensor, Tensor]:
    z = preactivations(x, W_enc, b_enc, buffer)
    top = z.flatten().topk(min(k_total, z.numel()), sorted=False)
    chosen = torch.zeros(z.numel(), dtype=torch.bool, device=z.device)
    chosen[top.indices[top.values > 0]] = True
    values, latents, starts = entries(z, chosen.view_as(z))
    return *padded(values, latents, starts), smallest(values)


@torch.no_grad()
def threshold_encode_eager(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor, buffer: Buffer = None
) -> tuple[Tensor, Tensor]:
    z = preactivations(x, W_enc, b_enc, buffer)
    return padded(*entries(z, z > theta.to(z.dtype)))


@torch.no_grad()
def groupmax_encode_eager(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, buffer: Buffer = None
) -> tuple[Tensor, Tensor]:
    size = group_size(k, W_enc)
    z = preactivations(x, W_enc, b_enc, buffer)
    selected, within = z.view(len(z), k, size).max(-1)
    return selected, within + size * torch.arange(k, device=z.device)


def group_size(k: int, W_enc: Tensor) -> int:
    if k < 1 or W_enc.shape[1] % k:
        raise ValueError(f"d_dict={W_enc.shape[1]} is not a multiple of k={k}, the number of groups")
    return W_enc.shape[1] // k


def smallest(values: Tensor) -> Tensor:
    """The smallest entry, a scalar; 0 if there is none."""
    return values.min() if values.numel() else values.new_zeros(())


# By certified bounds


def rescored(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, bounds: Tensor, threshold: Tensor, workspace: Workspace
) -> Entries | None:
    """Exact pre-activations of all whose bound reaches the threshold; None if they are too many."""
    found = candidates(bounds, threshold, W_enc.shape[1] // MOST, workspace, whole=True)
    if found is None:
        return None
    starts, latents = found
    workspace.counters.candidates += len(latents)
    return sampled_product(x, W_enc.t(), starts, latents).add_(b_enc[latents]), latents, starts


def certified_batch_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k_total: int, workspace: Workspace
) -> tuple[Tensor, Tensor, Tensor] | None:
    """None where no certificate was found."""
    lowered = lower_encoder(W_enc, b_enc, workspace)
    bounds, typical, error = upper_bounds(x, lowered, workspace)
    batch, width = bounds.shape
    n_groups = min(-(-4 * k_total // batch), width // 2)
    size = width // n_groups
    maxima = bounds.view(torch.int16)[:, : size * n_groups].view(batch, size, n_groups).amax(1).flatten()
    if k_total > maxima.numel():
        return None
    start = maxima.float().kthvalue(maxima.numel() - k_total + 1).values.to(torch.int16).view(torch.bfloat16).float()
    threshold = (start * (1 - 2.0**-8) - 1.1 * typical.mean()).bfloat16()
    for _ in range(2):
        # a threshold of the smallest positive number keeps all that is positive, and needs no certificate
        threshold = torch.where(threshold > 0, threshold, SMALLEST)
        found = rescored(x, W_enc, b_enc, bounds, threshold.expand(batch), workspace)
        if found is None:
            return None
        values = found[0]
        top = values.topk(min(k_total, len(values)), sorted=False)
        certain = (top.values.min() if len(values) >= k_total else values.new_zeros(())) - 2 * error.max()
        if certain >= threshold or (threshold == SMALLEST and certain > -torch.inf):
            chosen = torch.zeros(len(values), dtype=torch.bool)
            chosen[top.indices[top.values > 0]] = True
            values, latents, starts = kept(found, chosen)
            return *padded(values, latents, starts), smallest(values)
        threshold = (certain * (1 - 2.0**-7)).bfloat16()
    return None


SMALLEST = torch.ones((), dtype=torch.int16).view(torch.bfloat16)
"""The smallest positive bfloat16."""


def certified_threshold(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor, workspace: Workspace
) -> tuple[Tensor, Tensor] | None:
    """None where the bounds do not hold, or too many pass."""
    lowered = lower_encoder(W_enc, b_enc, workspace, theta)
    step = max(1, CHUNK_BYTES // (2 * lowered.rows.shape[0]))
    parts: list[Entries] = []
    for start in range(0, len(x), step):
        rows = x[start : start + step]
        bounds, _, error = upper_bounds(rows, lowered, workspace)
        found = rescored(rows, W_enc, b_enc, bounds, SMALLEST.expand(len(rows)), workspace)
        if found is None or not torch.isfinite(error).all():
            return None
        parts.append(kept(found, found[0] > theta.expand(W_enc.shape[1])[found[1]]))
    counts = torch.cat([part[2].diff() for part in parts])
    values, latents = (torch.cat([part[i] for part in parts]) for i in range(2))
    return padded(values, latents, F.pad(counts.cumsum(0), (1, 0)))


# What callers use


def _try_fast(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, buffer: Buffer, search: Any) -> Any:
    """The certified answer, where the fast path suits and finds one."""
    if isinstance(buffer, Tensor):
        return None
    workspace = buffer or Workspace()
    counters, rows = workspace.counters, x.shape[0]
    if not suits(x, W_enc, b_enc, k, workspace):
        counters.plain += rows
        return None
    counters.fast += rows
    with plain(x.device):
        found = search(workspace)
    if found is None:
        counters.dense += rows
    return found


@torch.no_grad()
def batch_topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k_total: int, buffer: Buffer = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The k_total largest positive pre-activations of the batch -> (selected, indices), both [batch, slots], and the
    smallest of them, a scalar (0 if none is positive)."""
    x, W_enc, b_enc = one_type(x, W_enc, b_enc)
    if torch.compiler.is_compiling():
        return batch_topk_encode_op(x, W_enc, b_enc, k_total)
    most = x.shape[0] * W_enc.shape[1]
    if not 1 <= k_total <= max(most, 1) and x.shape[0]:
        raise ValueError(f"k_total={k_total} is not in 1..batch*d_dict={most}")
    found = _try_fast(
        x, W_enc, b_enc, -(-k_total // max(x.shape[0], 1)), buffer,
        lambda workspace: certified_batch_topk(x, W_enc, b_enc, k_total, workspace),
    )  # fmt: skip
    return batch_topk_encode_eager(x, W_enc, b_enc, k_total, buffer) if found is None else found


@torch.no_grad()
def threshold_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor | float, buffer: Buffer = None
) -> tuple[Tensor, Tensor]:
    """All pre-activations above theta, a number or one per latent -> (selected, indices), both [batch, slots]."""
    theta = torch.as_tensor(theta, device=b_enc.device)
    if theta.ndim > 1 or theta.numel() not in (1, W_enc.shape[1]):
        raise ValueError(f"theta {tuple(theta.shape)} is neither a number nor one per latent of {W_enc.shape[1]}")
    x, W_enc, b_enc = one_type(x, W_enc, b_enc)
    level = theta.to(x.dtype)
    if torch.compiler.is_compiling():
        return threshold_encode_op(x, W_enc, b_enc, level)
    found = _try_fast(
        x, W_enc, b_enc, 1, buffer, lambda workspace: certified_threshold(x, W_enc, b_enc, level, workspace)
    )
    return threshold_encode_eager(x, W_enc, b_enc, level, buffer) if found is None else found


@torch.no_grad()
def groupmax_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, buffer: Buffer = None) -> tuple[Tensor, Tensor]:
    """The largest pre-activation of each of k groups of consecutive latents and its index, both [batch, k]."""
    group_size(k, W_enc)
    if torch.compiler.is_compiling():
        return groupmax_encode_op(*one_type(x, W_enc, b_enc), k)
    return groupmax_encode_eager(x, W_enc, b_enc, k, buffer)


@custom_op("interp::batch_topk_encode", mutates_args=())
def batch_topk_encode_op(x: Tensor, W_enc: Tensor, b_enc: Tensor, k_total: int) -> tuple[Tensor, Tensor, Tensor]:
    return batch_topk_encode(x, W_enc, b_enc, k_total)


@custom_op("interp::threshold_encode", mutates_args=())
def threshold_encode_op(x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    return threshold_encode(x, W_enc, b_enc, theta)


@custom_op("interp::groupmax_encode", mutates_args=())
def groupmax_encode_op(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return groupmax_encode(x, W_enc, b_enc, k)


def _slots(x: Tensor) -> tuple[Tensor, Tensor]:
    """As many slots as the data will need."""
    slots = get_ctx().new_dynamic_size()
    return x.new_empty(x.shape[0], slots), x.new_empty(x.shape[0], slots, dtype=torch.int64)


@batch_topk_encode_op.register_fake
def _(x: Tensor, W_enc: Tensor, b_enc: Tensor, k_total: int) -> tuple[Tensor, Tensor, Tensor]:
    return *_slots(x), x.new_empty(())


@threshold_encode_op.register_fake
def _(x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    return _slots(x)


@groupmax_encode_op.register_fake
def _(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int64)
