"""How good is a ranking of edges at every size, and how good is one circuit: curve, CPR, CMD, completeness, minimality.

    curve         f(k) of the best k % of edges, k in 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100
    CPR           area under f, circuits chosen by signed score: higher is better; above 1, what works against is out
    CMD           area under |1 - f|, circuits chosen by |score|: lower is better
    completeness  largest |F(C without K) - F(M without K)| over sets K of the circuit's nodes, in units of the gap
    minimality    of each node v, the largest |F(C without K and v) - F(C without K)| over sets K, in units of the gap
f is the faithfulness of `evaluate`, F the metric, M the whole model; areas are trapezoids over k as a share, from
0.1 % on, as the benchmark takes them (Mueller et al. 2025, https://arxiv.org/abs/2504.13151). The last two are the IOI
paper's (K. Wang et al. 2023, https://arxiv.org/abs/2211.00593), with sets K drawn at random and by layer.
Beware: the area is nearly all of large circuits (half of it above 50 %), so look at the curve; a node can be needed
only where another is gone, which few sets K will show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.circuits.evaluate import faithfulness
from interp.circuits.graph import Circuit, EdgeScores
from interp.circuits.prune import greedy, top
from interp.core.errors import InterpError, unknown
from interp.core.seed import torch_generator
from interp.models.model import LoadedModel
from interp.tasks.base import PromptPairs
from interp.tasks.metrics import Metric

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Sizes of the curve, as shares of all edges."""
SELECTIONS = ("top", "greedy")
MINIMAL = 0.01
"""Share of the gap below which a node is not needed (the IOI paper's 1 %)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """Faithfulness of nested circuits."""

    shares: tuple[float, ...]
    sizes: tuple[int, ...]
    values: Float[Tensor, " share"]
    """f of the mean metric."""
    per_pair: Float[Tensor, "share pair"]
    signed: bool

    @property
    def cpr(self) -> float:
        """Area under f."""
        return area(self.shares, self.values.tolist())

    @property
    def cmd(self) -> float:
        """Area under |1 - f|."""
        return area(self.shares, (1 - self.values).abs().tolist())


def area(shares: Sequence[float], values: Sequence[float]) -> float:
    """Trapezoids between the first and the last share."""
    return float(np.trapezoid(np.asarray(values), np.asarray(shares)))


def choose(scores: EdgeScores, n: int, select: str = "top", *, signed: bool = False) -> Circuit:
    """A circuit of `n` edges: the best, or the best that hang together."""
    if select not in SELECTIONS:
        raise unknown("selection", select, SELECTIONS)
    return (greedy if select == "greedy" else top)(scores, n, signed=signed)


def size_of(scores: EdgeScores, share: float) -> int:
    """Edges of a share, at least one."""
    return min(scores.graph.n_edges, max(1, round(share * scores.graph.n_edges)))


def curve(
    model: LoadedModel,
    pairs: PromptPairs,
    scores: EdgeScores,
    metric: Metric,
    *,
    signed: bool = False,
    select: str = "top",
    ablation: str = "corrupt",
    shares: Sequence[float] = SHARES,
) -> Curve:
    """f at every size."""
    circuits = [choose(scores, size_of(scores, share), select, signed=signed) for share in shares]
    found = faithfulness(model, pairs, circuits, metric, ablation=ablation)
    return Curve(
        shares=tuple(shares), sizes=found.sizes, values=found.mean.double(), per_pair=found.per_pair, signed=signed
    )


def node_sets(circuit: Circuit, n_random: int, seed: int) -> list[tuple[str, ...]]:
    """Sets of the circuit's nodes: those of each layer, and random ones of every size."""
    nodes = [name for name in circuit.nodes() if name not in ("logits", "embed")]
    by_layer: dict[int, list[str]] = {}
    for name in nodes:
        by_layer.setdefault(circuit.graph.sources[circuit.graph.source(name)].layer, []).append(name)
    generator = torch_generator(seed, "node sets")
    drawn: list[tuple[str, ...]] = []
    for _ in range(n_random if nodes else 0):
        size = int(torch.randint(1, len(nodes) + 1, (), generator=generator))
        drawn.append(tuple(nodes[i] for i in torch.randperm(len(nodes), generator=generator)[:size].sort().values))
    return [*(tuple(group) for group in by_layer.values()), *drawn]


@dataclass(frozen=True, kw_only=True, eq=False)
class Completeness:
    """How differently the circuit and the model take it when nodes are removed from both."""

    sets: tuple[tuple[str, ...], ...]
    circuit: Float[Tensor, " set"]
    """F(C without K), as a share of the gap above the corrupted run."""
    model: Float[Tensor, " set"]
    """F(M without K), likewise."""

    @property
    def worst(self) -> float:
        """The largest difference: 0 is complete."""
        return float((self.circuit - self.model).abs().max()) if self.sets else 0.0


def completeness(
    model: LoadedModel,
    pairs: PromptPairs,
    circuit: Circuit,
    metric: Metric,
    *,
    n_random: int = 8,
    seed: int = 0,
    ablation: str = "corrupt",
) -> Completeness:
    """Remove sets of nodes (with all edges out of them) from the circuit and from the model."""
    sets = node_sets(circuit, n_random, seed)
    whole = circuit.graph.full()
    both = [_less(there, names) for there in (circuit, whole) for names in sets]
    if not both:
        return Completeness(sets=(), circuit=torch.zeros(0), model=torch.zeros(0))
    found = faithfulness(model, pairs, both, metric, ablation=ablation).mean
    return Completeness(sets=tuple(sets), circuit=found[: len(sets)], model=found[len(sets) :])


def minimality(
    model: LoadedModel,
    pairs: PromptPairs,
    circuit: Circuit,
    metric: Metric,
    *,
    n_random: int = 2,
    seed: int = 0,
    ablation: str = "corrupt",
) -> dict[str, float]:
    """Each node -> the largest change of F when it goes too, from the whole circuit or from it less a random set."""
    nodes = [name for name in circuit.nodes() if name != "logits"]
    if not nodes:
        raise InterpError("the circuit has no nodes to leave out")
    generator = torch_generator(seed, "minimality")
    sets: list[tuple[str, ...]] = [()]
    for _ in range(n_random):
        half = torch.randperm(len(nodes), generator=generator)[: len(nodes) // 4]
        sets.append(tuple(nodes[i] for i in half.tolist()))
    listed = [_less(circuit, (*names, *more)) for names in sets for more in ((), *((v,) for v in nodes))]
    values = faithfulness(model, pairs, listed, metric, ablation=ablation).mean.view(len(sets), 1 + len(nodes))
    change = (values[:, 1:] - values[:, :1]).abs().amax(0)
    return dict(zip(nodes, change.tolist(), strict=True))


def _less(circuit: Circuit, sources: Sequence[str]) -> Circuit:
    """Without the edges that leave these sources; those into them stay."""
    edges = circuit.edges.clone()
    edges[[circuit.graph.source(name) for name in sources]] = False
    return Circuit(circuit.graph, edges)
