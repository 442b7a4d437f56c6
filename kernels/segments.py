"""The codes of a batch ordered by latent: which slots used latent i, in the order of the tokens.

Both row gradients (decoder and encoder) and the bias gradient sum over the same segments, so one sort serves them all:
make it once with `by_latent` and pass it along. The sort is stable, so every sum has one order and no atomics are
needed: two runs are bitwise equal.

`pieces` cuts segments longer than `PIECE` for the GPU, where one program per segment would be serialised by a latent
that fires on a large part of the batch. All its sizes are bounds that need no look at the data, so nothing waits for
the device. With n slots: pieces <= m + n / PIECE; pieces of cut segments <= 2 n / PIECE.
"""

from typing import NamedTuple

import torch
from torch import Tensor

PIECE = 256
"""Slots that one program sums in sequence."""


class Segments(NamedTuple):
    """Slots slots[starts[i]] .. slots[starts[i + 1]] of the flattened codes use latent i."""

    slots: Tensor
    """[batch * k] int64."""
    starts: Tensor
    """[d_dict + 1]."""


class Pieces(NamedTuple):
    """Which part of which segment each program sums, and where it puts the sum."""

    owner: Tensor
    """[bound] latent of each piece; d_dict for the surplus of the bound."""
    first: Tensor
    """[d_dict] number of its first piece."""
    count: Tensor
    """[d_dict] number of its pieces, at least 1: an unused latent has its row of zeros written."""
    spill: Tensor
    """[d_dict] row of `n_spill` where the sum of its first piece goes, if it has several."""
    n_spill: int


def by_latent(indices: Tensor, d_dict: int) -> Segments:
    """indices [batch, k] -> the slots in order of their latents."""
    keys = indices.reshape(-1)
    if d_dict < 2**31:
        keys = keys.int()  # half the bytes to sort
    keys, slots = keys.sort(stable=True)
    latents = torch.arange(d_dict + 1, device=indices.device, dtype=keys.dtype)
    return Segments(slots, torch.searchsorted(keys, latents))


def pieces(segments: Segments, piece: int = PIECE) -> Pieces:
    """Segments cut to at most `piece` slots."""
    starts = segments.starts
    count = (starts.diff() + (piece - 1)).div(piece, rounding_mode="floor").clamp_(min=1)
    last = count.cumsum(0)
    several = torch.where(count > 1, count, 0)
    cut = -(-segments.slots.numel() // piece)
    numbers = torch.arange(len(count) + cut, device=starts.device)
    owner = torch.searchsorted(last, numbers, right=True)
    return Pieces(owner, last - count, count, several.cumsum(0) - several, max(2 * cut, 1))
