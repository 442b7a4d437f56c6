"""Layer x strength: where, and how hard, is it worth steering?

Every setting is measured on a validation half of the prompts and on neutral text; the setting that is kept is the one
with the largest validation effect among those whose KL on neutral text is within a budget. A setting chosen this way
looks better than it is, so it must be reported on prompts and text that took no part in the choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from interp.core.errors import InterpError
from interp.core.progress import track
from interp.models.model import LoadedModel
from interp.steering.directions import direction, read_last, reliability
from interp.steering.evaluate import Batch, Neutral, Readout, propensities, slope
from interp.steering.vectors import typical_norm
from interp.tasks.sentiment import ContrastPairs


@dataclass(frozen=True, kw_only=True, eq=False)
class Directions:
    """Directions of one contrast at several layers."""

    layers: tuple[int, ...]
    differences: Float[Tensor, "layer pair d_model"]
    raw: Float[Tensor, "layer d_model"]
    norms: Float[Tensor, " layer"]
    """Median norm of the stream on neutral text: the unit of strength."""
    table: pd.DataFrame

    @property
    def units(self) -> Float[Tensor, "layer d_model"]:
        return normalize(self.raw, dim=1)

    def at(self, layer: int) -> tuple[Float[Tensor, " d_model"], float]:
        """Unit vector and norm of a layer."""
        index = self.layers.index(layer)
        return self.units[index], float(self.norms[index])


def find_directions(
    model: LoadedModel, pairs: ContrastPairs, layers: Sequence[int], neutral: Batch, *, method: str, seed: int
) -> Directions:
    """Directions at some layers with what is known about their reliability."""
    positive, negative = (read_last(model, side, layers) for side in (pairs.positive, pairs.negative))
    raw = torch.stack([direction(p - n, method) for p, n in zip(positive, negative, strict=True)])
    norms = typical_norm(model, neutral.record, list(layers))
    rows: list[dict[str, float]] = []
    for index, layer in enumerate(layers):
        found = reliability(positive[index], negative[index], method=method, seed=seed)
        rows.append({"layer": layer, "relative_norm": float(raw[index].norm() / norms[index]), **vars(found)})
    return Directions(
        layers=tuple(layers), differences=positive - negative, raw=raw, norms=norms, table=pd.DataFrame(rows)
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Sweep:
    """Effect and cost of every setting."""

    layers: tuple[int, ...]
    strengths: tuple[float, ...]
    base: Float[Tensor, " prompt"]
    values: Float[Tensor, "layer strength prompt"]
    cost: Float[Tensor, "layer strength 2"]

    @property
    def effects(self) -> Float[Tensor, "layer strength"]:
        """Mean change of the propensity."""
        return (self.values - self.base).mean(-1)

    def table(self) -> pd.DataFrame:
        """One row per setting."""
        rows = [
            {
                "layer": layer,
                "strength": strength,
                "effect": float(self.effects[i, j]),
                "kl": float(self.cost[i, j, 0]),
                "perplexity_ratio": float(self.cost[i, j, 1]),
            }
            for i, layer in enumerate(self.layers)
            for j, strength in enumerate(self.strengths)
        ]
        return pd.DataFrame(rows)

    def slopes(self) -> pd.DataFrame:
        """Per layer: slope of the propensity against strength, share of prompts that move the wrong way, cost."""
        doses = torch.tensor([*self.strengths, 0.0])
        rows: list[dict[str, float]] = []
        for i, layer in enumerate(self.layers):
            each = slope(doses, torch.cat([self.values[i], self.base[None]]))
            kl = float(self.cost[i, :, 0].mean())
            mean = float(each.mean())
            wrong = float((each < 0).double().mean())
            rows.append(
                {"layer": layer, "slope": mean, "anti_steerable": wrong, "mean_kl": kl, "slope_per_kl": mean / kl}
            )
        return pd.DataFrame(rows)

    def choose(self, budget: float) -> tuple[int, float, bool]:
        """(layer, strength, whether it is within the budget): the largest effect whose KL is at most `budget`."""
        table = self.table().query("strength > 0")
        if table.empty:
            raise InterpError(f"strengths={self.strengths} has no positive value to choose")
        within = table.query("kl <= @budget")
        best = table.sort_values("kl").iloc[0] if within.empty else within.sort_values("effect").iloc[-1]
        return int(best["layer"]), float(best["strength"]), not within.empty


def sweep(
    found: Directions,
    strengths: Sequence[float],
    prompts: Sequence[Batch],
    reading: Readout,
    neutral: Neutral,
) -> Sweep:
    """Measure every layer and strength."""
    doses = torch.tensor(list(strengths), dtype=torch.float32)[:, None]
    values: list[Tensor] = []
    costs: list[Tensor] = []
    base: Tensor | None = None
    for layer in track(found.layers, "steering: layers"):
        unit, norm = found.at(layer)
        site, vectors = f"resid_post.{layer}", doses * norm * unit
        if base is None:
            base = propensities(prompts, reading, site, torch.zeros_like(unit)[None])[0]
        values.append(propensities(prompts, reading, site, vectors))
        costs.append(neutral.cost(site, vectors))
    assert base is not None
    return Sweep(
        layers=found.layers,
        strengths=tuple(strengths),
        base=base,
        values=torch.stack(values),
        cost=torch.stack(costs),
    )
