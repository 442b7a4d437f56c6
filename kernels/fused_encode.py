"""Exact top-k and group-max on a GPU from the t largest of every group of latents, with a certificate per row.

tau, the k-th largest of what was kept, is the k-th largest of all if no group hides a larger one. A group can hide
only what is below its own t-th kept value, so a row is certified when that value is <= tau in every group. The others
are done again from their dense pre-activations, summed in the same order. For independent latents a row fails when t
of its top k fall in one group: about C(k, t) / L^(t - 1) of the rows with L = m / group groups. `choose_groups` takes
the fewest kept values for which that is below a hundredth. Neighbouring latents that fire together make failures more
frequent, never wrong.

`fused` forms the groups inside the product; `two_pass` reads pre-activations that the vendor's product wrote. Neither
has been timed on a device yet, so `interp.kernels.topk_encode` takes them only when asked (`Workspace(fast=True)`).
After the group maxima of the radix-free top-k of L. Gao et al., 2024 (https://arxiv.org/abs/2406.04093) and the
group-max encoder of EleutherAI's sparsify.
"""

import math
from collections.abc import Callable

import torch
from interp.kernels.dispatch import use_triton
from interp.kernels.group_top import dense_triton, group_top_triton, select_triton
from interp.kernels.workspace import Workspace
from torch import Tensor

SHAPES = sorted(((t, group) for t in (2, 3, 4) for group in (16, 32, 64)), key=lambda shape: shape[0] / shape[1])
"""Values kept per group and its width, fewest first."""
FAILURES = 1e-2
"""Accepted share of rows that fail, were latents independent."""


def choose_groups(k: int, m: int) -> tuple[int, int] | None:
    """How many values to keep per group, and its width; None if too many rows would fail."""
    for t, group in SHAPES:
        n_groups = m // group
        if t * n_groups >= 2 * k and math.comb(k, t) <= FAILURES * n_groups ** (t - 1):
            return t, group
    return None


def groups_for(k: int, m: int) -> tuple[int, int]:
    found = choose_groups(k, m)
    if found is None:
        raise ValueError(f"k={k} of {m} latents is too many for groups")
    return found


def suits_fused(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, workspace: Workspace) -> bool:
    return (
        workspace.fast is True
        and use_triton(x, W_enc, b_enc)
        and x.shape[0] > 0
        and choose_groups(k, W_enc.shape[1]) is not None
    )


def certify(kept: Tensor, places: Tensor, k: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values and indices [batch, k] of the k largest kept ones, and which rows hide nothing larger."""
    n_groups = kept.shape[2]
    top = kept.flatten(1).topk(k, dim=1, sorted=False)
    tau = top.values.amin(1, keepdim=True)
    place = places.flatten(1).gather(1, top.indices).long()
    sure = (kept[:, -1] <= tau).all(1) & (tau[:, 0] > -torch.inf)
    return top.values, top.indices % n_groups * group + place, sure


def topk_from_groups(
    kept: Tensor, places: Tensor, k: int, group: int, dense: Callable[[Tensor], Tensor], workspace: Workspace
) -> tuple[Tensor, Tensor]:
    """Exact top-k: certified rows as they are, the others from `dense(rows)`, their pre-activations."""
    values, indices, sure = certify(kept, places, k, group)
    left = (~sure).nonzero().view(-1)  # the one place where the host waits for the device
    workspace.counters.fast += len(values)
    workspace.counters.dense += len(left)
    if len(left):
        top = dense(left).float().topk(k, dim=1, sorted=False)
        values[left], indices[left] = top.values, top.indices
    return values, indices


def fused_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, workspace: Workspace, tile: dict[str, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Exact top-k of float32 sums; z is never written. Values come in the type of x."""
    t, group = groups_for(k, W_enc.shape[1])
    kept, places = group_top_triton(x, W_enc, b_enc, t, group, tile)
    values, indices = topk_from_groups(
        kept, places, k, group, lambda rows: dense_triton(x[rows], W_enc, b_enc, tile), workspace
    )
    return values.to(x.dtype), indices


def two_pass_topk(z: Tensor, k: int, workspace: Workspace) -> tuple[Tensor, Tensor]:
    """Exact top-k of pre-activations that are there, read once."""
    t, group = groups_for(k, z.shape[1])
    values, indices = topk_from_groups(*select_triton(z, t, group), k, group, lambda rows: z[rows], workspace)
    return values.to(z.dtype), indices


def fused_groupmax(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, tile: dict[str, int] | None = None
) -> tuple[Tensor, Tensor]:
    """The largest of each of k groups of consecutive latents; their width must be a multiple of 8."""
    size = W_enc.shape[1] // k
    part = size & -size  # the largest power of two that divides it
    if W_enc.shape[1] % k or part < 8:
        raise ValueError(f"{W_enc.shape[1]} latents do not make {k} groups of a multiple of 8")
    part = min(part, 64)
    kept, places = group_top_triton(x, W_enc, b_enc, 1, part, tile)
    best = kept.view(len(x), k, size // part).max(-1)
    within = places.view(len(x), k, size // part).gather(-1, best.indices[..., None])[..., 0].long()
    indices = torch.arange(k, device=x.device) * size + best.indices * part + within
    return best.values.to(x.dtype), indices
