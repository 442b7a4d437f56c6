"""Activations whose features are known: did the dictionary find them, beyond chance?

    x = sum_i f_i g_i + noise ,   g_i random unit directions (n_features, d), f sparse and positive

Each token draws `n_active` distinct features, feature i with weight (i + 1)^-skew (skew 0: all equally often), with
values uniform in [0.5, 1.5]. With a hierarchy the last features are children: wherever a child is active its parent is
too, so a child's direction never occurs alone; this is what absorption feeds on (D. Chanin et al. 2024,
https://arxiv.org/abs/2409.14507; B. Bussmann et al. 2025, https://arxiv.org/abs/2503.17547).

mmcs  mean over true directions of the largest cosine with a learned one; chance: as many random directions
mcc   mean correlation of true and learned codes over tokens, after the one-to-one matching that makes it largest
      (A. Hyvarinen & H. Morioka 2016, https://arxiv.org/abs/1605.06336); chance: the same with the tokens of the true
      codes permuted
Beware: a rare feature that does not occur among the tokens looked at has no correlation and is left out (reported);
random directions are far from cosine 0: in 64 dimensions 1024 of them reach .395.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor
from torch.nn import functional as F

from interp.core.errors import InterpError
from interp.core.seed import derive, torch_generator
from interp.dictionaries.base import Dictionary, rows
from interp.dictionaries.metrics import chance_max_cosine, mean_max_cosine

METRICS = {
    "mmcs": "v1: mean over true directions of the largest cosine with a feature; chance: as many random directions",
    "mcc": "v1: mean Pearson correlation of true and learned codes after the one-to-one matching with the largest sum; "
    "true features active at no token are left out; chance: true codes with their tokens permuted",
    "recovered": "v1: share of true directions whose largest cosine with a feature is above .9",
}
RECOVERED = 0.9
BLOCK = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class Planted:
    """A distribution of activations with known features."""

    features: Float[Tensor, "n d"]
    """Unit rows."""
    weights: Float[Tensor, "n"]
    """How often each feature is drawn, relative to the others."""
    parents: Int[Tensor, "n"]
    """The feature that is active wherever this one is; -1 for none."""
    n_active: int
    noise: float = 0.0

    def sample(self, n_tokens: int, *, seed: int) -> tuple[Float[Tensor, "tokens d"], Float[Tensor, "tokens n"]]:
        """Activations and the codes that made them."""
        return self._draw(n_tokens, torch_generator(seed, "planted-tokens"))

    def batches(self, batch_size: int, *, seed: int) -> Iterator[Float[Tensor, "batch d"]]:
        """Endless activations, for training."""
        generator = torch_generator(seed, "planted-batches")
        while True:
            yield self._draw(batch_size, generator)[0]

    def _draw(self, n_tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        # Exponential clocks: the n_active that ring first are drawn without replacement, with these weights.
        clocks = torch.empty(n_tokens, len(self.weights)).exponential_(generator=generator) / self.weights
        active = clocks.topk(self.n_active, dim=1, largest=False).indices
        on = torch.zeros(n_tokens, len(self.weights)).scatter_(1, active, 1.0)
        child = self.parents >= 0
        if bool(child.any()):
            on.index_add_(1, self.parents[child], on[:, child]).clamp_(max=1.0)
        codes = on * (torch.rand(on.shape, generator=generator) + 0.5)
        x = codes @ self.features
        if self.noise:
            x = x + self.noise * torch.randn(x.shape, generator=generator)
        return x, codes


def planted(
    n_features: int = 1024,
    d: int = 128,
    *,
    n_active: int = 5,
    skew: float = 0.5,
    children: float = 0.0,
    noise: float = 0.0,
    seed: int = 0,
) -> Planted:
    """Random directions; `children` is the share of features that have a parent (one level, parents drawn at random).

    With children, up to twice `n_active` features are active at a token.
    """
    if not 1 <= n_active <= n_features or d < 1:
        raise InterpError(f"n_active={n_active} of n_features={n_features} in d={d}; need 1 <= n_active <= n_features")
    if not 0 <= children < 1 or skew < 0 or noise < 0:
        raise InterpError(f"children={children} must lie in [0, 1), skew={skew} and noise={noise} be at least 0")
    generator = torch_generator(seed, "planted", n_features, d)
    features = F.normalize(torch.randn(n_features, d, generator=generator, dtype=torch.float64), dim=1).float()
    weights = torch.arange(1, n_features + 1, dtype=torch.float32) ** -skew
    n_children = int(children * n_features)
    parents = torch.full((n_features,), -1)
    if n_children:
        n_roots = n_features - n_children
        parents[n_roots:] = torch.randint(n_roots, (n_children,), generator=generator)
    return Planted(features=features, weights=weights, parents=parents, n_active=n_active, noise=noise)


@dataclass(frozen=True, kw_only=True, eq=False)
class Recovery:
    """How much of the truth a dictionary holds, and what chance reaches."""

    mmcs: float
    mmcs_chance: float
    mcc: float
    mcc_chance: float
    recovered: float
    n_absent: int
    """True features active at none of the tokens, left out of mcc."""
    best_cosine: Float[Tensor, "n"]
    """Per true feature."""


@torch.no_grad()
def recovery(truth: Planted, dictionary: Dictionary, *, n_tokens: int = 8192, seed: int = 1) -> Recovery:
    """Hold a dictionary against the features that made its activations, on fresh tokens."""
    if dictionary.features.shape[1] != truth.features.shape[1]:
        raise InterpError(f"features of width {dictionary.features.shape[1]} against {truth.features.shape[1]}")
    x, codes = truth.sample(n_tokens, seed=seed)
    learned = torch.cat([dictionary.encode(block).dense() for block in rows(x, BLOCK)])
    present = codes.any(0)
    order = torch.randperm(n_tokens, generator=torch_generator(seed, "planted-null"))
    cosines = F.normalize(truth.features, dim=1) @ F.normalize(dictionary.features.float(), dim=1).T
    best = cosines.max(1).values
    return Recovery(
        mmcs=mean_max_cosine(truth.features, dictionary.features),
        mmcs_chance=chance_max_cosine(truth.features, dictionary.d_dict, seed=derive(seed, "chance")),
        mcc=matched_correlation(codes[:, present], learned),
        mcc_chance=matched_correlation(codes[order][:, present], learned),
        recovered=float((best > RECOVERED).double().mean()),
        n_absent=int((~present).sum()),
        best_cosine=best,
    )


@torch.no_grad()
def matched_correlation(a: Float[Tensor, "tokens n"], b: Float[Tensor, "tokens m"]) -> float:
    """Mean Pearson correlation of matched columns (Hungarian); columns of a without a partner count as 0."""
    return float(matching(correlations(a, b)).sum()) / max(a.shape[1], 1)


@torch.no_grad()
def correlations(a: Float[Tensor, "tokens n"], b: Float[Tensor, "tokens m"]) -> Float[Tensor, "n m"]:
    """Pearson correlation of every column with every column; constant columns have correlation 0."""
    left, right = a.double() - a.double().mean(0), b.double() - b.double().mean(0)
    return F.normalize(left, dim=0).T @ F.normalize(right, dim=0)


def matching(gain: Float[Tensor, "n m"]) -> Float[Tensor, "pairs"]:
    """Gains of the one-to-one matching with the largest sum."""
    values = gain.double().cpu().numpy()
    row, column = linear_sum_assignment(values, maximize=True)
    return torch.from_numpy(np.asarray(values[row, column]))
