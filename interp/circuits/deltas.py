"""What sources add to the stream beyond their reference, and what of it reaches each destination.

With several circuits at once, every circuit has its own streams; those of sources that no circuit can change (`shared`)
are held once, and what destinations read from them is computed once for all circuits that agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(kw_only=True, eq=False)
class Deltas:
    """One stream for each source that has an edge out in some circuit."""

    edges: Bool[Tensor, "circuit used destination"]
    place: Int[Tensor, " source"]
    """Where a source stands in `values`; -1 if no circuit uses it, or if it is shared."""
    values: Float[Tensor, "circuit used pair_pos_d"]
    shape: torch.Size
    """Of one stream: pair, pos, d_model."""
    shared_edges: Bool[Tensor, "circuit shared destination"]
    shared: Float[Tensor, "shared pair_pos_d"]
    """Streams of the first sources, the same for all circuits."""
    n: int = 0
    """How many stand in `values` by now."""

    @staticmethod
    def of(
        edges: Bool[Tensor, "circuit source destination"],
        like: Float[Tensor, "pair pos d_model"],
        shared: Float[Tensor, "shared pair pos d_model"] | None = None,
        *,
        keep: bool = False,
    ) -> Deltas:
        """`keep`: hold every source, used or not."""
        n_shared = 0 if shared is None else len(shared)
        used = torch.ones_like(edges[0, :, 0]) if keep else edges.any(2).any(0)
        used[:n_shared] = False
        return Deltas(
            edges=edges[:, used],
            place=torch.where(used, used.cumsum(0) - 1, -1).cpu(),
            values=like.new_empty(len(edges), int(used.sum()), like.numel()),
            shape=like.shape,
            shared_edges=edges[:, :n_shared],
            shared=like.new_empty(0, like.numel()) if shared is None else shared.flatten(1),
        )

    def wants(self, row: int) -> bool:
        return int(self.place[row]) >= 0

    def add(self, row: int, values: Float[Tensor, "..."]) -> None:
        """Sources come in the order of the graph; those left out in between have not changed."""
        place = int(self.place[row])
        self.values[:, self.n : place] = 0
        self.values[:, place] = values.reshape(-1, self.values.shape[2])
        self.n = place + 1

    def finished(self) -> Float[Tensor, "circuit used pair pos d_model"]:
        """All streams; what was not added is 0."""
        self.values[:, self.n :] = 0
        return self.values.unflatten(2, self.shape)

    def added(self, columns: Sequence[int]) -> tuple[list[int], Float[Tensor, "read circuit pair pos d_model"]]:
        """Which of these destinations any circuit adds to, and what."""
        span = slice(columns[0], columns[-1] + 1)
        own, common = self.edges[:, : self.n, span], self.shared_edges[:, :, span]
        there = (own.any(1) | common.any(1)).any(0).nonzero()[:, 0].tolist()
        weights = own[:, :, there].mT.to(self.values.dtype)
        made = torch.bmm(weights, self.values[:, : self.n])
        if len(self.shared) and there:
            self._add_shared(made, common[:, :, there].mT.to(self.values.dtype))
        return [columns[i] for i in there], made.unflatten(2, self.shape).transpose(0, 1)

    def _add_shared(self, made: Tensor, weights: Float[Tensor, "circuit read shared"]) -> None:
        alike = (weights == weights[:1]).all(2).all(0)
        if bool(alike.any()):
            made[:, alike] += weights[0, alike] @ self.shared
        if not bool(alike.all()):
            made[:, ~alike] += weights[:, ~alike] @ self.shared
