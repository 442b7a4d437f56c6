"""Sparse codes: which latents of a dictionary are active at each token, and how much.

What every dictionary's `encode` returns. Axes: any leading token axes, then `k` slots per token; a slot whose value is
zero is not active. Dense and COO views are made on demand, never kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.errors import InterpError


@dataclass(frozen=True, eq=False)
class SparseCodes:
    """At most k active latents per token, of d_dict."""

    values: Float[Tensor, "*batch k"]
    indices: Int[Tensor, "*batch k"]
    d_dict: int

    def __post_init__(self) -> None:
        if self.values.shape != self.indices.shape or self.values.ndim < 1:
            raise InterpError(
                f"values {tuple(self.values.shape)} and indices {tuple(self.indices.shape)} need one shape"
            )

    @property
    def k(self) -> int:
        """Slots per token."""
        return self.values.shape[-1]

    def flat(self) -> SparseCodes:
        """The same codes with one token axis."""
        n = math.prod(self.values.shape[:-1])  # -1 is ambiguous for k = 0
        return SparseCodes(self.values.reshape(n, self.k), self.indices.reshape(n, self.k), self.d_dict)

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
