"""How good is a dictionary? Versioned definitions, each independent of the batch size.

fvu            1 - explained variance, with the mean over the same tokens: the mean predictor scores 1, a perfect one 0.
l0             mean number of active latents per token.
dead_fraction  share of latents that are active at none of the tokens looked at (the number of tokens matters).
loss_recovered (CE_zero - CE_sae) / (CE_zero - CE_base); see `interp.dictionaries.splice`.

Beware: a low FVU is not feature recovery (an L1 autoencoder can reach FVU .004 with most features wrong), and
zero ablation is so destructive that loss_recovered looks excellent: report the raw losses beside it. Two libraries of
the field subtract the squared mean over dimensions too, which drifts once activations are not of unit size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from interp.core.errors import InterpError
from interp.dictionaries.base import Dictionary

METRICS = {
    "fvu": "v1: sum |x - x_hat|^2 / sum |x - mean x|^2, sums over tokens and coordinates, mean over the same tokens",
    "l0": "v1: mean number of non-zero latents per token",
    "dead_fraction": "v1: share of latents non-zero at no evaluated token",
    "loss_recovered": "v1: (CE_zero - CE_sae) / (CE_zero - CE_base), nats, means over the same predicted tokens; "
    "tokens with dropped activations keep their own",
}


class Moments:
    """Streaming sums in float64 about the first batch's mean; any split of the rows gives the same FVU."""

    def __init__(self) -> None:
        self.n = 0
        self.error = 0.0
        self._square = 0.0
        self._shift: Tensor | None = None
        self._sum: Tensor | None = None

    def update(self, x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"]) -> None:
        if len(x) == 0:
            return
        wide = x.double()
        if self._shift is None or self._sum is None:
            self._shift = wide.mean(0)
            self._sum = torch.zeros_like(self._shift)
        shifted = wide - self._shift
        self.n += len(x)
        self._sum += shifted.sum(0)
        self._square += float(shifted.square().sum())
        self.error += float((wide - x_hat.double()).square().sum())

    @property
    def variance(self) -> float:
        """Sum over tokens and coordinates of |x - mean x|^2."""
        if self._sum is None:
            raise InterpError("no activations to evaluate on; raise the number of sequences")
        return self._square - float(self._sum.square().sum()) / self.n

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained; undefined where nothing varies."""
        variance = self.variance
        if variance <= 0:
            raise InterpError(f"the {self.n} activations do not vary, so FVU is undefined; evaluate on more tokens")
        return self.error / variance


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """Scores of one dictionary on one set of tokens."""

    fvu: float
    l0: float
    dead_fraction: float
    n_tokens: int
    density: Float[Tensor, "d_dict"]
    """Share of tokens at which each latent is active."""


@torch.no_grad()
def evaluate(dictionary: Dictionary, batches: Iterable[Float[Tensor, "n d"]]) -> Evaluation:
    """Score a dictionary on batches of activations."""
    moments = Moments()
    firings: Int[Tensor, "d_dict"] | None = None
    for x in batches:
        codes = dictionary.encode(x)
        moments.update(x, dictionary.decode(codes))
        firings = codes.firings() if firings is None else firings + codes.firings()
    fvu = moments.fvu
    assert firings is not None
    return Evaluation(
        fvu=fvu,
        l0=float(firings.sum()) / moments.n,
        dead_fraction=float((firings == 0).double().mean()),
        n_tokens=moments.n,
        density=(firings.double() / moments.n).float().cpu(),
    )


@torch.no_grad()
def mean_max_cosine(truth: Float[Tensor, "n d"], features: Float[Tensor, "m d"]) -> float:
    """Mean over true directions of the largest cosine with a learned one (MMCS). Print the chance level beside it."""
    cosines = F.normalize(truth.double(), dim=1) @ F.normalize(features.double(), dim=1).T
    return float(cosines.max(1).values.mean())
