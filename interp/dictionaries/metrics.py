"""How good is a dictionary? Versioned definitions, each independent of the batch size.

fvu             1 - explained variance, with the mean over the same tokens: the mean predictor scores 1, perfect is 0.
mse             squared error per token and coordinate.
cosine          mean over tokens of cos(x, x_hat); 0 where the reconstruction is 0.
norm_ratio      mean over tokens of |x_hat| / |x|: below 1 is shrinkage.
gamma           relative reconstruction bias, sum |x_hat|^2 / sum <x, x_hat>: 1 where no rescaling of x_hat would help
                (S. Rajamanoharan et al. 2024, https://arxiv.org/abs/2404.16014).
l0              mean number of active latents per token.
dead_fraction   share of latents that are active at none of the tokens looked at (the number of tokens matters).
dense_fraction  share of latents that are active at more than a tenth of them.
loss_recovered  (CE_zero - CE_sae) / (CE_zero - CE_base); see `interp.dictionaries.splice`.

For a transcoder x is the target, not the input. Beware: a low FVU is not feature recovery (an L1 autoencoder can reach
FVU .004 with most features wrong), and zero ablation is so destructive that loss_recovered looks excellent: report the
raw losses beside it. Two libraries of the field subtract the squared mean over dimensions too, which drifts once
activations are not of unit size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from interp.core.errors import InterpError
from interp.core.seed import torch_generator
from interp.dictionaries.base import Dictionary

METRICS = {
    "fvu": "v1: sum |x - x_hat|^2 / sum |x - mean x|^2, sums over tokens and coordinates, mean over the same tokens",
    "mse": "v1: mean over tokens and coordinates of (x - x_hat)^2",
    "cosine": "v1: mean over tokens of cos(x, x_hat); 0 where x_hat or x is 0",
    "norm_ratio": "v1: mean over tokens of |x_hat| / |x|",
    "gamma": "v1: sum |x_hat|^2 / sum <x, x_hat>, sums over tokens",
    "l0": "v1: mean number of non-zero latents per token",
    "dead_fraction": "v1: share of latents non-zero at no evaluated token",
    "dense_fraction": "v1: share of latents non-zero at more than 10 % of the evaluated tokens",
    "loss_recovered": "v1: (CE_zero - CE_sae) / (CE_zero - CE_base), nats, means over the same predicted tokens; "
    "tokens with dropped activations keep their own",
}
DENSE = 0.1
"""Share of tokens above which a latent counts as dense."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenScores:
    """What each token contributes to the metrics of reconstruction; float64."""

    error: Float[Tensor, "n"]
    """|x - x_hat|^2"""
    cosine: Float[Tensor, "n"]
    norm_ratio: Float[Tensor, "n"]
    hat_power: Float[Tensor, "n"]
    """|x_hat|^2"""
    dot: Float[Tensor, "n"]
    """<x, x_hat>"""


def token_scores(x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"]) -> TokenScores:
    """Compare targets and reconstructions token by token."""
    wide, hat = x.double(), x_hat.double()
    power, hat_power, dot = wide.square().sum(1), hat.square().sum(1), (wide * hat).sum(1)
    scale = (power * hat_power).sqrt()
    return TokenScores(
        error=(wide - hat).square().sum(1),
        cosine=torch.where(scale > 0, dot / scale.clamp_min(1e-300), 0.0),
        norm_ratio=(hat_power / power.clamp_min(1e-300)).sqrt(),
        hat_power=hat_power,
        dot=dot,
    )


class Moments:
    """Streaming sums in float64, about the first batch's mean; any split of the rows gives the same metrics."""

    def __init__(self) -> None:
        self.n = 0
        self.d = 0
        self.error = 0.0
        self._cosine = self._norm_ratio = self._hat_power = self._dot = 0.0
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
            self.d = x.shape[1]
        shifted = wide - self._shift
        self.n += len(x)
        self._sum += shifted.sum(0)
        self._square += float(shifted.square().sum())
        scores = token_scores(x, x_hat)
        self.error += float(scores.error.sum())
        self._cosine += float(scores.cosine.sum())
        self._norm_ratio += float(scores.norm_ratio.sum())
        self._hat_power += float(scores.hat_power.sum())
        self._dot += float(scores.dot.sum())

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

    @property
    def mse(self) -> float:
        return self.error / (self.n * self.d)

    @property
    def cosine(self) -> float:
        return self._cosine / self.n

    @property
    def norm_ratio(self) -> float:
        return self._norm_ratio / self.n

    @property
    def gamma(self) -> float | None:
        """None where reconstructions have no part along their targets, so that the bias has no scale."""
        return self._hat_power / self._dot if self._dot > 0 else None


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """Scores of one dictionary on one set of tokens."""

    fvu: float
    l0: float
    dead_fraction: float
    n_tokens: int
    density: Float[Tensor, "d_dict"]
    """Share of tokens at which each latent is active."""
    mse: float
    cosine: float
    norm_ratio: float
    gamma: float | None
    """None where reconstructions have no part along their targets."""
    dense_fraction: float


@torch.no_grad()
def evaluate(
    dictionary: Dictionary, batches: Iterable[Float[Tensor, "n d"] | tuple[Float[Tensor, "n d"], Float[Tensor, "n e"]]]
) -> Evaluation:
    """Score a dictionary on batches of activations; pairs (input, target) for a transcoder."""
    moments = Moments()
    firings: Int[Tensor, "d_dict"] | None = None
    for batch in batches:
        x, y = batch if isinstance(batch, tuple) else (batch, batch)
        codes = dictionary.encode(x)
        moments.update(y, dictionary.decode(codes))
        firings = codes.firings() if firings is None else firings + codes.firings()
    fvu = moments.fvu
    assert firings is not None
    density = firings.double() / moments.n
    return Evaluation(
        fvu=fvu,
        l0=float(firings.sum()) / moments.n,
        dead_fraction=share(firings == 0),
        n_tokens=moments.n,
        density=density.float().cpu(),
        mse=moments.mse,
        cosine=moments.cosine,
        norm_ratio=moments.norm_ratio,
        gamma=moments.gamma,
        dense_fraction=share(density > DENSE),
    )


def share(flags: Tensor) -> float:
    """Mean of flags; 0 where there are none."""
    return float(flags.double().mean()) if flags.numel() else 0.0


@torch.no_grad()
def mean_max_cosine(truth: Float[Tensor, "n d"], features: Float[Tensor, "m d"]) -> float:
    """Mean over true directions of the largest cosine with a learned one (MMCS). Print the chance level beside it."""
    cosines = F.normalize(truth.double(), dim=1) @ F.normalize(features.double(), dim=1).T
    return float(cosines.max(1).values.mean())


@torch.no_grad()
def chance_max_cosine(truth: Float[Tensor, "n d"], n_features: int, *, seed: int = 0) -> float:
    """The MMCS that as many random directions reach."""
    drawn = torch.randn(n_features, truth.shape[1], generator=torch_generator(seed, "chance-mmcs"))
    return mean_max_cosine(truth, drawn.to(truth.device))
