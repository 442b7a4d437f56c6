"""Patching directions: the algebra, free of any model (a helper of `subspace`).

One direction or k of them, as orthonormal rows R (k, D): a' = a + (a_s - a) R^T R, the activation of the base with its
coordinates along R taken from the source. More general, reading along one set and writing along another,
    a' = a + sum_i (read_i . (a_s - a)) write_i
so that a direction v = v_R + v_N can be read by its null part and written whole. At the hidden layer of an MLP,
    row part v_R = P v, P = Q Q^T, Q the left singular vectors of W_out (m, d) with a singular value above a threshold
    null part v_N = v - v_R, for which v_N @ W_out = 0: nothing behind this layer can see it
Source: A. Makelov, G. Lange, N. Nanda, Is this the subspace you are looking for?, 2023,
https://arxiv.org/abs/2311.17030.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.core.errors import InterpError

Acts = Float[Tensor, "row D"]
Basis = Float[Tensor, "k D"]


class Outcome(NamedTuple):
    """What a patched run says."""

    logit_diff: Float[Tensor, " row"]
    """Logit of the base's own answer less that of the answer wanted after patching."""
    hit: Float[Tensor, " row"]
    """1 where the answer wanted is the likeliest of all."""


Reader = Callable[[Tensor, Tensor], Outcome]
"""`(acts (row, D), rows (row,)) -> Outcome`: runs the rest of a model from given activations at the site,
differentiable in them; `rows[i]` is the pair that activation i belongs to."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sides:
    """Activations of base and source at the site, and which class the base is of."""

    base: Acts
    source: Acts
    label: Bool[Tensor, " row"]
    """Class of the base; the source is of the other one."""

    def __post_init__(self) -> None:
        if self.base.shape != self.source.shape or len(self.label) != len(self.base):
            shapes = tuple(self.base.shape), tuple(self.source.shape), len(self.label)
            raise InterpError(f"base, source and label need one row per pair, got {shapes}")

    def __len__(self) -> int:
        return len(self.base)

    @property
    def width(self) -> int:
        return self.base.shape[1]

    @property
    def pooled(self) -> tuple[Float[Tensor, "both D"], Bool[Tensor, " both"]]:
        """All clean activations with their class."""
        return torch.cat([self.base, self.source]), torch.cat([self.label, ~self.label])


def interchange(sides: Sides, read: Basis, write: Basis) -> Acts:
    """a + sum_i (read_i . (source - a)) write_i."""
    like = sides.base
    return like + (sides.source - like) @ read.to(like).T @ write.to(like)


def unit(rows: Basis) -> Basis:
    """Orthonormal rows with the same span, the first along the first; rows that are 0 stay 0."""
    if len(rows) == 1:
        norm = rows.norm()
        return rows / norm if float(norm.detach()) > TINY else torch.zeros_like(rows)
    q, r = torch.linalg.qr(rows.T)
    size = r.diagonal().abs()
    keep = (size > TINY * size.max().clamp_min(TINY)).to(q)
    return (q * keep * r.diagonal().sign()).T


TINY = 1e-9
"""Length under which a part counts as absent."""


def row_space(w_out: Float[Tensor, "D d"], threshold: float) -> Float[Tensor, "D rank"]:
    """Orthonormal columns Q: what the layer's output can see. `threshold` is relative to the largest singular value."""
    if not 0 < threshold < 1:
        raise InterpError(f"rank_threshold={threshold} must lie between 0 and 1; 1e-3 is usual")
    u, s, _ = torch.linalg.svd(w_out.double().cpu(), full_matrices=False)
    return u[:, s > threshold * s[0]]


def split(basis: Basis, q: Float[Tensor, "D rank"]) -> tuple[Basis, Basis]:
    """Row part and null part; they add up to the basis."""
    wide = basis.double().cpu()
    row = wide @ q @ q.T
    return row, wide - row


def auc(values: Float[Tensor, " n"], positive: Bool[Tensor, " n"]) -> float:
    """How well one number separates two classes: 0.5 not at all, 1 perfectly, whichever class is the higher."""
    a, b = values[positive].double(), values[~positive].double()
    if not len(a) or not len(b):
        raise InterpError("a separation needs both classes")
    gap = a[:, None] - b[None, :]
    share = float(((gap > 0).double() + 0.5 * (gap == 0).double()).mean())
    return max(share, 1 - share)


def mean_difference(sides: Sides) -> Basis:
    """Difference of the class means, of length 1: (1, D)."""
    acts, positive = sides.pooled
    return unit((acts[positive].double().mean(0) - acts[~positive].double().mean(0))[None])


class Spread:
    """How far activations are from the clean ones, in standard deviations along their main directions.

    sqrt of the mean of p_i^2 / lambda_i over the `n` largest principal directions and of the squared remainder outside
    of them over its clean mean: 1 is ordinary.
    """

    def __init__(self, clean: Float[Tensor, "n D"], n_directions: int = 20) -> None:
        x = clean.double()
        self.mean = x.mean(0)
        _, s, vh = torch.linalg.svd(x - self.mean, full_matrices=False)
        keep = min(n_directions, int((s > 1e-6 * s[0].clamp_min(TINY)).sum()))
        self.directions, self.scale = vh[:keep], s[:keep] / max(1, len(x) - 1) ** 0.5
        largest = float(self.scale[0]) if keep else 1.0
        self.outside = max(float(self._remainder(x).mean()), (1e-6 * largest) ** 2)

    def _remainder(self, x: Float[Tensor, "row D"]) -> Float[Tensor, " row"]:
        """Squared length outside of the main directions."""
        centred = x - self.mean
        return (centred - centred @ self.directions.T @ self.directions).square().sum(1)

    def __call__(self, acts: Float[Tensor, "row D"]) -> Float[Tensor, " row"]:
        """Root mean square of the standardised coordinates."""
        x = acts.double()
        inside = ((x - self.mean) @ self.directions.T / self.scale).square()
        if len(self.scale) == x.shape[1]:
            return inside.mean(1).sqrt()  # there is no outside
        return torch.cat([inside, self._remainder(x)[:, None] / self.outside], dim=1).mean(1).sqrt()
