"""How much of a model's behaviour a circuit keeps.

    faithfulness  f(C) = (M(C) - M(none)) / (M(all) - M(none))
for each pair, and with means over the pairs above and below the line. M(C) is the metric of the model run with only
the edges of C (`interp.circuits.running`), on the clean prompts, with all else at its reference: the corrupted run
("corrupt", default), zero, or the mean over corrupted prompts. f = 1: nothing is lost; above 1: what spoke against is
gone (Miller et al. 2024, https://arxiv.org/abs/2407.08734; Hanna et al. 2024, https://arxiv.org/abs/2403.17806).
Beware: the ablation moves every number, so say which; a small gap between the runs makes f meaningless and is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from interp.circuits.graph import Circuit
from interp.circuits.running import Evaluator
from interp.circuits.streams import batches, budget_of, stream_bytes
from interp.core.errors import InterpError
from interp.core.progress import track
from interp.models.model import LoadedModel
from interp.tasks.base import PromptPairs
from interp.tasks.metrics import Metric

SIMILAR = 2
"""Circuits with up to this many times the edges of the smallest go together."""
SMALLEST_GAP = 1e-3
"""Gap between the two runs, as a share of the metric's size, below which f is not a number to report."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Faithfulness:
    """The metric of each circuit and pair, with its two ends."""

    values: Float[Tensor, "circuit pair"]
    all: Float[Tensor, " pair"]
    """With all edges: the clean run."""
    none: Float[Tensor, " pair"]
    """With no edges."""
    ablation: str
    metric: str
    sizes: tuple[int, ...]
    """Edges of each circuit."""

    def __post_init__(self) -> None:
        gap, size = self.gap.mean().abs(), torch.cat([self.all, self.none]).abs().mean()
        if not bool(gap > SMALLEST_GAP * size):
            raise InterpError(
                f"the metric {self.metric} is {float(self.all.mean()):.4g} with all edges and "
                f"{float(self.none.mean()):.4g} with none: there is no difference that a circuit could carry; "
                "choose other prompts, another metric or another ablation"
            )

    @property
    def gap(self) -> Float[Tensor, " pair"]:
        return self.all - self.none

    @property
    def mean(self) -> Float[Tensor, " circuit"]:
        """f of the means over pairs: the number to report."""
        return (self.values - self.none).mean(1) / self.gap.mean()

    @property
    def per_pair(self) -> Float[Tensor, "circuit pair"]:
        """f of every pair; NaN where the two runs of a pair hardly differ."""
        small = self.gap.abs() <= SMALLEST_GAP * self.gap.abs().mean()
        return torch.where(small, torch.nan, (self.values - self.none) / torch.where(small, 1.0, self.gap))


def faithfulness(
    model: LoadedModel,
    pairs: PromptPairs,
    circuits: Circuit | Sequence[Circuit],
    metric: Metric,
    *,
    ablation: str = "corrupt",
    budget: int | None = None,
) -> Faithfulness:
    """Run the model with each circuit. All circuits are of one graph; `budget`: bytes to plan with."""
    listed, limit = _listed(circuits), budget_of(budget)
    values = torch.zeros(len(listed), len(pairs), dtype=torch.promote_types(model.dtype, torch.float32))
    ends = torch.zeros(2, len(pairs), dtype=values.dtype)
    for evaluator in evaluators(model, pairs, listed[0], ablation, metric.n_last, limit):
        here = evaluator.pair_ids
        ends[0, here], ends[1, here] = (end.to(values) for end in evaluator.ends(metric))
        for group in track(_groups(listed, evaluator.circuits_at_once(limit)), "running circuits"):
            found = evaluator.values([listed[i] for i in group], metric).to(values)
            values[torch.tensor(group)[:, None], here] = found
    return Faithfulness(
        values=values, all=ends[0], none=ends[1], ablation=ablation, metric=metric.name,
        sizes=tuple(circuit.size for circuit in listed),
    )  # fmt: skip


def run_circuit(
    model: LoadedModel,
    pairs: PromptPairs,
    circuits: Circuit | Sequence[Circuit],
    *,
    ablation: str = "corrupt",
    n_last: int = 1,
    budget: int | None = None,
) -> Float[Tensor, "circuit pair last vocab"]:
    """Logits of the last positions with each circuit; one circuit makes a first axis of 1."""
    listed, limit, found = _listed(circuits), budget_of(budget), list[Tensor]()
    for evaluator in evaluators(model, pairs, listed[0], ablation, n_last, limit):
        n = evaluator.circuits_at_once(limit)
        found.append(torch.cat([evaluator.logits(listed[i : i + n], n_last) for i in range(0, len(listed), n)]))
    return torch.cat(found, dim=1)


def evaluators(
    model: LoadedModel, pairs: PromptPairs, circuit: Circuit, ablation: str, n_last: int, budget: int
) -> Iterator[Evaluator]:
    """Evaluators of the pairs in batches that fit, one after the other. Means are over all pairs: no batches there."""
    graph = circuit.graph
    per_pair = stream_bytes(model, pairs) * (2 * len(graph.sources) + 14 * graph.n_layers)
    parts = [range(len(pairs))] if ablation == "mean" else batches(pairs, per_pair, budget)
    for part in parts:
        yield Evaluator(model, pairs.take(part), graph, ablation=ablation, n_last=n_last, first=part.start)


def _groups(circuits: Sequence[Circuit], most: int) -> list[list[int]]:
    """Which circuits are run together: of similar size, since every row computes what any of them needs."""
    groups: list[list[int]] = []
    for i in sorted(range(len(circuits)), key=lambda i: circuits[i].size):
        if groups and len(groups[-1]) < most and circuits[i].size <= SIMILAR * circuits[groups[-1][0]].size:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _listed(circuits: Circuit | Sequence[Circuit]) -> list[Circuit]:
    found = [circuits] if isinstance(circuits, Circuit) else list(circuits)
    if not found:
        raise InterpError("no circuits were given")
    return found
