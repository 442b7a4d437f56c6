"""How far can estimated scores of edges be trusted? The top and a random tail are patched exactly.

The top says how well the estimate measures what it found; the tail, drawn from all other edges, says what it may have
missed: a miss is an edge of the tail whose measured effect is at least the smallest estimate of the top. `bound` is the
upper end of the exact (Clopper-Pearson) 95 % interval for the share of such edges among those that were not checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.circuits.exact import Effects, exact_effects
from interp.circuits.graph import EdgeScores
from interp.core.errors import InterpError
from interp.core.seed import torch_generator
from interp.models.model import LoadedModel
from interp.tasks.base import PromptPairs
from interp.tasks.metrics import Metric


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """Estimates beside measured effects."""

    effects: Effects
    estimates: Float[Tensor, " edge"]
    top: Bool[Tensor, " edge"]
    """Which belong to the top; the others were drawn at random."""

    @property
    def names(self) -> tuple[str, ...]:
        return self.effects.names

    @property
    def exact(self) -> Float[Tensor, " edge"]:
        return self.effects.mean

    @property
    def pearson(self) -> float:
        """Correlation of estimates and measured effects, top and tail together."""
        return float(torch.corrcoef(torch.stack([self.estimates.double(), self.exact.double()]))[0, 1])

    @property
    def slope(self) -> float:
        """Measured effect for one unit of estimate: the least-squares line through 0."""
        x, y = self.estimates.double(), self.exact.double()
        return float((x @ y) / (x @ x))

    @property
    def cutoff(self) -> float:
        """Smallest estimate of the top."""
        return float(self.estimates[self.top].abs().min())

    @property
    def missed(self) -> list[str]:
        """Edges of the tail that belong to the top."""
        found = (~self.top) & (self.exact.abs() >= self.cutoff)
        return [self.names[i] for i in found.nonzero()[:, 0].tolist()]

    @property
    def bound(self) -> float:
        """With 95 % confidence, at most this share of the unchecked edges was missed; 1 without a tail."""
        return upper_share(len(self.missed), int((~self.top).sum()))


def calibrate(
    model: LoadedModel,
    pairs: PromptPairs,
    scores: EdgeScores,
    metric: Metric,
    *,
    n_top: int = 20,
    n_random: int = 20,
    seed: int = 0,
    budget: int | None = None,
) -> Calibration:
    """Patch the `n_top` edges of largest |score| and `n_random` of the others, of the same pairs."""
    ranked = scores.ranked()
    if not 0 < n_top <= len(ranked) or not 0 <= n_random <= len(ranked) - n_top:
        raise InterpError(f"n_top={n_top} and n_random={n_random} do not fit a graph of {len(ranked)} edges")
    order = torch.randperm(len(ranked) - n_top, generator=torch_generator(seed, "calibration"))[:n_random]
    chosen = torch.cat([ranked[:n_top], ranked[n_top:][order.sort().values]])
    names = [scores.graph.name(row, column) for row, column in chosen.tolist()]
    return Calibration(
        effects=exact_effects(model, pairs, scores.graph, metric, names, budget=budget),
        estimates=scores.values.cpu()[chosen[:, 0], chosen[:, 1]],
        top=torch.arange(len(chosen)) < n_top,
    )


def upper_share(found: int, n: int, level: float = 0.95) -> float:
    """Largest share under which `found` or fewer of `n` still happen with chance (1 - level) / 2 (Clopper-Pearson)."""
    if found >= n:
        return 1.0
    low, high = found / n, 1.0
    for _ in range(60):
        share = (low + high) / 2
        chance = sum(comb(n, i) * share**i * (1 - share) ** (n - i) for i in range(found + 1))
        low, high = (share, high) if chance > (1 - level) / 2 else (low, share)
    return high
