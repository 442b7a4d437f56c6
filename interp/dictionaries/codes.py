"""Sparse codes: which latents of a dictionary are active at each token, and how much.

What every dictionary's `encode` returns. Axes: any leading token axes, then `k` slots per token; a slot whose value is
zero is not active. Kinds with a threshold fill as many slots as their busiest token needs. Dense and COO views are
made on demand, never kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import InterpError


@dataclass(frozen=True, eq=False)
class SparseCodes:
    """At most k active latents per token, of d_dict."""

    values: Float[Tensor, "*batch k"]
    indices: Int[Tensor, "*batch k"]
    d_dict: int
    gain: Float[Tensor, "*batch 1"] | None = None
    """What decoding multiplies each token's sum by, where inputs were normalised token by token; None for 1."""
    offset: Float[Tensor, "*batch d_out"] | None = None
    """What decoding adds to each token besides its features: a skip connection, a removed mean; None for 0."""
    segments: tuple[Tensor, Tensor] | None = None
    """The slots sorted by latent, where that was computed: both gradients with d_dict rows need it."""

    def __post_init__(self) -> None:
        if self.values.shape != self.indices.shape or self.values.ndim < 1:
            raise InterpError(
                f"values {tuple(self.values.shape)} and indices {tuple(self.indices.shape)} need one shape"
            )

    @property
    def k(self) -> int:
        """Slots per token."""
        return self.values.shape[-1]

    def shaped(self, *batch: int) -> SparseCodes:
        """The same codes with other token axes."""
        gain = None if self.gain is None else self.gain.reshape(*batch, 1)
        offset = None if self.offset is None else self.offset.reshape(*batch, self.offset.shape[-1])
        values, indices = self.values.reshape(*batch, self.k), self.indices.reshape(*batch, self.k)
        return SparseCodes(values, indices, self.d_dict, gain, offset)

    def flat(self) -> SparseCodes:
        """The same codes with one token axis."""
        return self.shaped(math.prod(self.values.shape[:-1]))  # -1 is ambiguous for k = 0

    def with_values(self, values: Float[Tensor, "*batch k"]) -> SparseCodes:
        """Other values at the same latents, decoded in the same way."""
        return SparseCodes(values, self.indices, self.d_dict, self.gain, self.offset, self.segments)

    def first(self, n_slots: int) -> SparseCodes:
        """The first slots of each token alone."""
        values, indices = self.values[..., :n_slots], self.indices[..., :n_slots]
        return SparseCodes(values, indices, self.d_dict, self.gain, self.offset)

    def dense(self) -> Float[Tensor, "*batch d_dict"]:
        """One column per latent; a latent listed twice is summed."""
        zeros = self.values.new_zeros(*self.values.shape[:-1], self.d_dict)
        return zeros.scatter_add(-1, self.indices.long(), self.values)

    def coo(self) -> Tensor:
        """Sparse COO matrix (tokens, d_dict), coalesced; zero slots are left out."""
        flat = self.flat()
        token, slot = flat.values.nonzero(as_tuple=True)
        where = torch.stack([token, flat.indices[token, slot].long()])
        shape = (flat.values.shape[0], self.d_dict)
        return torch.sparse_coo_tensor(where, flat.values[token, slot], shape, check_invariants=True).coalesce()

    def l0(self) -> Int[Tensor, "*batch"]:
        """Number of active latents per token."""
        return (self.values != 0).sum(-1)

    def firings(self) -> Int[Tensor, "d_dict"]:
        """At how many tokens each latent is active."""
        return torch.bincount(self.indices[self.values != 0].long(), minlength=self.d_dict)


def pack(
    z: Float[Tensor, "batch d_dict"], chosen: Bool[Tensor, "batch d_dict"]
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """z at the chosen latents of each row, and their indices, in as many slots as the fullest row needs.

    Spare slots hold the value 0 and latent 0.
    """
    row, latent = chosen.nonzero(as_tuple=True)
    counts = torch.bincount(row, minlength=z.shape[0])
    slots = int(counts.max()) if len(row) else 0
    starts = counts.cumsum(0) - counts
    slot = torch.arange(len(row), device=z.device) - starts[row]
    values, indices = z.new_zeros(z.shape[0], slots), row.new_zeros(z.shape[0], slots)
    values[row, slot] = z[row, latent]
    indices[row, slot] = latent
    return values, indices


def from_dense(f: Float[Tensor, "batch d_dict"]) -> SparseCodes:
    """The non-zero entries of dense codes."""
    values, indices = pack(f, f != 0)
    return SparseCodes(values, indices, f.shape[1])
