"""One setting in full: dose-response, effect on every prompt, cost, and the directions that could have done as well.

Controls at the same site and strength: random unit vectors, and directions made from the same pairs with half of
their labels exchanged (the same activations, but no behaviour). A direction is also compared with itself: the cosine
between the directions of two halves of the pairs, against the same with exchanged labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.controls import Interval, bootstrap_interval, rank_test
from interp.core.progress import track
from interp.core.result import Control
from interp.steering.directions import (
    random_directions,
    random_signs,
    shuffled_directions,
    split_half_cosines,
)
from interp.steering.evaluate import Batch, Neutral, Readout, propensities, slope
from interp.steering.sweep import Directions

PER_PASS = 5
"""Control directions per progress step, and how many of them are also measured on neutral text."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """The chosen setting and its controls, on prompts and text that took no part in the choice."""

    site: str
    strength: float
    strengths: tuple[float, ...]
    unit: Float[Tensor, " d_model"]
    norm: float
    base: Float[Tensor, " prompt"]
    doses: Float[Tensor, "strength prompt"]
    """Propensity at every strength."""
    cost: Float[Tensor, " 2"]
    """KL on neutral text, and perplexity ratio."""
    random: Float[Tensor, "n prompt"]
    """Change of the propensity under random directions, at the chosen strength."""
    shuffled: Float[Tensor, "n prompt"]
    random_cost: Float[Tensor, "some 2"]
    split: Float[Tensor, " split"]
    split_shuffled: Float[Tensor, " n"]

    @property
    def effects(self) -> Float[Tensor, " prompt"]:
        """Change of the propensity of each prompt at the chosen strength."""
        return self.doses[self.strengths.index(self.strength)] - self.base

    @property
    def slopes(self) -> Float[Tensor, " prompt"]:
        """Change of the propensity per unit of strength, over all strengths."""
        return slope(torch.tensor([*self.strengths, 0.0]), torch.cat([self.doses, self.base[None]]))

    def interval(self, seed: int) -> Interval:
        """Bootstrap interval of the mean effect, over prompts."""
        return bootstrap_interval(self.effects, seed=seed)

    def dose_table(self, seed: int) -> pd.DataFrame:
        """Mean effect against strength, with its interval; random directions as a band up to the chosen strength."""
        rows: list[tuple[str, float, float, float, float]] = [("mean difference", 0.0, 0.0, 0.0, 0.0)]
        for strength, values in zip(self.strengths, self.doses, strict=True):
            found = bootstrap_interval(values - self.base, seed=seed)
            rows.append(("mean difference", strength, found.estimate, found.low, found.high))
        means, name = self.random.mean(1), f"control: {len(self.random)} random directions, 5 to 95 %"
        low, high = (float(means.quantile(q)) for q in (0.05, 0.95))
        rows += [(name, 0.0, 0.0, 0.0, 0.0), (name, self.strength, float(means.mean()), low, high)]
        return pd.DataFrame(rows, columns=["series", "strength", "effect", "low", "high"]).sort_values(
            ["series", "strength"], ignore_index=True
        )

    def prompt_table(self, prompts: tuple[str, ...]) -> pd.DataFrame:
        """One row per reported prompt, in order."""
        base, effects = self.base.tolist(), self.effects.tolist()
        return pd.DataFrame(
            {
                "prompt": prompts,
                "number": range(len(prompts)),
                "base": base,
                "steered": [b + e for b, e in zip(base, effects, strict=True)],
                "effect": effects,
                "control_p95": self.random.quantile(0.95, dim=0).tolist(),
                "slope": self.slopes.tolist(),
            }
        )

    def control_table(self) -> pd.DataFrame:
        """One row per control direction, and one for the direction itself."""
        rows = [("mean difference", 0, float(self.effects.mean()), float(self.cost[0]))]
        costs = self.random_cost[:, 0].tolist()
        for kind, values in (("random", self.random), ("shuffled labels", self.shuffled)):
            for number, effect in enumerate(values.mean(1).tolist()):
                known = kind == "random" and number < len(costs)
                rows.append((kind, number, effect, costs[number] if known else float("nan")))
        return pd.DataFrame(rows, columns=["direction", "number", "effect", "kl"])


def measure(
    found: Directions,
    layer: int,
    strength: float,
    *,
    strengths: tuple[float, ...],
    prompts: list[Batch],
    reading: Readout,
    neutral: Neutral,
    method: str,
    n_random: int,
    seed: int,
) -> Measured:
    """Measure one setting and its controls."""
    site, (unit, norm) = f"resid_post.{layer}", found.at(layer)
    differences = found.differences[found.layers.index(layer)]
    amounts = torch.tensor([0.0, *strengths])[:, None] * norm
    doses = propensities(prompts, reading, site, amounts * unit)
    random = random_directions(n_random, len(unit), seed=seed)
    shuffled = shuffled_directions(differences, n_random, method=method, seed=seed)
    vectors = torch.cat([random, shuffled]) * norm * strength
    chunks = track(vectors.split(PER_PASS), "steering: controls")
    changes = torch.cat([propensities(prompts, reading, site, chunk) for chunk in chunks]) - doses[0]
    signs = random_signs(n_random, len(differences), seed=seed)
    flipped = [split_half_cosines(row[:, None] * differences, method=method, seed=seed).mean() for row in signs]
    return Measured(
        site=site,
        strength=strength,
        strengths=strengths,
        unit=unit,
        norm=norm,
        base=doses[0],
        doses=doses[1:],
        cost=neutral.cost(site, (unit * norm * strength)[None])[0],
        random=changes[:n_random],
        shuffled=changes[n_random:],
        random_cost=neutral.cost(site, vectors[: min(PER_PASS, n_random)]),
        split=split_half_cosines(differences, method=method, seed=seed),
        split_shuffled=torch.stack(flipped),
    )


def p95(values: Float[Tensor, " n"]) -> float:
    """The 95th percentile."""
    return float(values.quantile(0.95))


def controls(found: Measured, kl_budget: float) -> tuple[Control, ...]:
    """What could have refuted the claim that the direction moves the behaviour."""
    effect, opposite = float(found.effects.mean()), [s for s in found.strengths if s < 0]
    random, shuffled = found.random.mean(1), found.shuffled.mean(1)
    split, exchanged = float(found.split.mean()), p95(found.split_shuffled)
    kl = float(found.cost[0])
    listed = [
        Control(
            name=f"{len(random)} random directions of equal norm",
            statistic="mean change of the propensity in nats; control: 95th percentile",
            observed=effect,
            control=p95(random),
            passed=effect > p95(random),
            p_value=rank_test(effect, random),
        ),
        Control(
            name=f"{len(shuffled)} directions from the same pairs, half of the labels exchanged",
            statistic="mean change of the propensity in nats; control: 95th percentile",
            observed=effect,
            control=p95(shuffled),
            passed=effect > p95(shuffled),
            p_value=rank_test(effect, shuffled),
        ),
        Control(
            name="the same direction from either half of the pairs",
            statistic="cosine between halves; control: 95th percentile with exchanged labels",
            observed=split,
            control=exchanged,
            passed=split > exchanged,
        ),
        Control(
            name="neutral text that took no part in the choice",
            statistic="KL in nats per token; control: the budget",
            observed=kl,
            control=kl_budget,
            passed=kl <= kl_budget,
        ),
    ]
    if opposite:
        back = float((found.doses[found.strengths.index(min(opposite))] - found.base).mean())
        listed.append(
            Control(
                name=f"the opposite sign, strength {min(opposite):g}",
                statistic="mean change of the propensity in nats; control: 0, to be undershot",
                observed=back,
                control=0.0,
                passed=back < 0,
            )
        )
    return tuple(listed)
