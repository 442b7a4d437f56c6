"""The stages of finding a circuit: scores, choice, curve, controls, evidence (a helper of `find`).

Each stage is kept, so that a killed run goes on (`stages`), and those that only add certainty stop when the time is up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from interp.circuits.acdc import acdc
from interp.circuits.attribution import edge_scores
from interp.circuits.controls import KINDS, draw_controls, stability
from interp.circuits.evaluate import faithfulness
from interp.circuits.exact import exact_effects
from interp.circuits.faithfulness import SHARES, choose, completeness, curve, minimality, size_of
from interp.circuits.graph import Circuit, EdgeScores, Graph
from interp.core.progress import listening, track
from interp.core.seed import torch_generator
from interp.core.stages import Clock, Stages, joined
from interp.models.model import LoadedModel
from interp.tasks.base import PromptPairs
from interp.tasks.metrics import Metric

CHUNK = 32
"""Control circuits, and edges whose effect is measured, between two looks at the clock."""
N_BAND = 6
"""Control circuits of each kind at every size of the curve."""
N_NULL = 16
"""Pairs on which control circuits are run."""
N_FEW = 8
"""Pairs on which what costs much is measured: bands, minimality."""
N_EVIDENCE = 4
"""Pairs on which the effect of every edge is measured."""
N_TAIL = 64
"""Random edges outside the circuit whose effect is measured."""
SMALL = 5000
"""Edges of a graph that counts as small."""
ACDC_START = 4
"""ACDC begins with the best edges, this many times the budget."""
ACDC_TAU = 0.002
"""What an edge must be worth to ACDC, as a share of the gap."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """What all stages need."""

    model: LoadedModel
    graph: Graph
    pairs: PromptPairs
    metric: Metric
    held: PromptPairs | None
    method: str
    select: str
    budget: int
    steps: int
    n_random: int
    seed: int
    stages: Stages
    clock: Clock

    @property
    def held_metric(self) -> Metric | None:
        return None if self.held is None else self.held.metric()


def scored(work: Work) -> tuple[EdgeScores, int]:
    """Scores of all edges, and how many destinations ACDC had no time for. ACDC's scores are the gradient's; what it
    took away is ranked below all that it kept."""
    gradient = "eap-ig" if work.method == "acdc" else work.method
    per_position = gradient != "exact"

    def make() -> dict[str, Tensor]:
        found = edge_scores(
            work.model, work.pairs, work.graph, work.metric, gradient, steps=work.steps, per_pair=True,
            per_position=per_position,
        )  # fmt: skip
        parts = {"values": found.values, "per_pair": found.per_pair, "per_position": found.per_position}
        return {name: value for name, value in parts.items() if value is not None}

    kept = work.stages.get("scores", make)
    scores = EdgeScores(
        graph=work.graph, values=kept["values"], method=work.method, n_pairs=len(work.pairs), metric=work.metric.name,
        per_pair=kept["per_pair"], per_position=kept.get("per_position"),
    )  # fmt: skip
    return _pruned(work, scores) if work.method == "acdc" else (scores, 0)


def _pruned(work: Work, scores: EdgeScores) -> tuple[EdgeScores, int]:
    def make() -> dict[str, Tensor]:
        start = choose(scores, min(work.graph.n_edges, ACDC_START * work.budget), work.select)
        ends = faithfulness(work.model, work.pairs, start, work.metric)
        tau = ACDC_TAU * float(ends.gap.mean().abs())
        found = acdc(
            work.model, work.pairs, work.graph, work.metric, tau, start=start, absolute=True,
            seconds=0.5 * work.clock.left,
        )  # fmt: skip
        return {"edges": found.circuit.edges, "n_left": torch.tensor(found.n_left)}

    kept = work.stages.get("acdc", make)
    return replace(scores, per_pair=None, first=kept["edges"]), int(kept["n_left"])


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """Faithfulness of a circuit, per pair, with what the identities of the evaluation leave."""

    f: float
    per_pair: Float[Tensor, " pair"]
    gained: Float[Tensor, " pair"]
    """Metric of the circuit, above that of the corrupted run."""
    gap: Float[Tensor, " pair"]
    """Metric of the clean run, above that of the corrupted run."""
    error: float
    """Largest difference of the metric with all (no) edges from the clean (corrupted) run, over the gap."""
    rest: float
    """f of all other edges."""

    def f_of_first(self, n: int) -> float:
        """f over the first `n` pairs."""
        return float(self.gained[:n].mean() / self.gap[:n].mean())


def measured(work: Work, circuit: Circuit, pairs: PromptPairs, metric: Metric, name: str) -> Measured:
    """One circuit, and its complement, on some prompts."""

    def make() -> dict[str, Tensor]:
        whole, none = circuit.graph.full(), circuit.graph.empty()
        found = faithfulness(work.model, pairs, [circuit, circuit.complement(), whole, none], metric)
        ends = torch.stack([found.values[2] - found.all, found.values[3] - found.none]).abs().max()
        return {
            "mean": found.mean, "per_pair": found.per_pair[0], "gained": found.values[0] - found.none,
            "gap": found.gap, "error": ends / found.gap.mean().abs(),
        }  # fmt: skip

    kept = work.stages.get(name, make)
    return Measured(
        f=float(kept["mean"][0]), rest=float(kept["mean"][1]), per_pair=kept["per_pair"], gained=kept["gained"],
        gap=kept["gap"], error=float(kept["error"]),
    )  # fmt: skip


def curves(work: Work, scores: EdgeScores) -> dict[str, Tensor]:
    """f at every size, chosen by |score| and by signed score; sizes; CPR and CMD."""

    def make() -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for name, signed in (("absolute", False), ("signed", True)):
            found = curve(work.model, work.pairs, scores, work.metric, signed=signed, select=work.select)
            made |= {name: found.values, f"{name}_pairs": found.per_pair, "sizes": torch.tensor(found.sizes)}
            made |= {f"{name}_areas": torch.tensor([found.cpr, found.cmd], dtype=torch.float64)}
        return made

    return work.stages.get("curve", make)


def null(
    work: Work, circuit: Circuit, kind: str, pairs: PromptPairs, metric: Metric, name: str, n: int
) -> Float[Tensor, " draw"]:
    """f of control circuits on the first pairs, in chunks until there are `n` or the time is up."""
    some = list(range(min(N_NULL, len(pairs))))
    pairs, metric = pairs.take(some), metric.take(some)
    parts: list[Tensor] = []
    for first in track(range(0, n, CHUNK), f"control circuits, {name}"):
        if work.clock.is_up:
            break
        size = min(CHUNK, n - first)

        def make(first: int = first, size: int = size) -> dict[str, Tensor]:
            drawn = draw_controls(kind, circuit, size, work.seed, first)
            with listening(_unheard):
                return {"f": faithfulness(work.model, pairs, drawn, metric).mean}

        parts.append(work.stages.get(f"{name}-{first}", make)["f"])
    return joined(parts)


def bands(work: Work, scores: EdgeScores) -> dict[str, Float[Tensor, "share draw"]]:
    """f of a few control circuits at every size but the last, smallest first while there is time; NaN after that."""
    few = work.pairs.take(range(min(N_FEW, len(work.pairs))))
    metric = work.metric.take(range(len(few)))
    made = {kind: torch.full((len(SHARES), N_BAND), torch.nan) for kind in KINDS}
    for i in track(range(len(SHARES) - 1), "control circuits of every size"):
        circuit = choose(scores, size_of(scores, SHARES[i]), work.select)
        for kind in KINDS:
            with listening(_unheard):
                found = null(work, circuit, kind, few, metric, f"band-{kind}-{i}", N_BAND)
            made[kind][i, : len(found)] = found.to(made[kind])
    return made


def _unheard(*_: object) -> None:
    """Nobody wants the progress of the parts of a part."""


def n_evidence(work: Work) -> int:
    """Pairs for measuring single edges: all of them where the graph is small."""
    return min(N_EVIDENCE if work.graph.n_edges > SMALL else N_FEW * N_EVIDENCE, len(work.pairs))


def evidence(work: Work, circuit: Circuit, scores: EdgeScores) -> Float[Tensor, "source destination"]:
    """Measured effect of each edge of the circuit alone, the heaviest first while there is time; NaN elsewhere."""
    pairs = work.pairs.take(range(n_evidence(work)))
    metric = work.metric.take(range(len(pairs)))
    edges = sorted(circuit, key=lambda name: -abs(scores[name]))
    effects = torch.full(circuit.edges.shape, torch.nan, dtype=torch.float64)
    for first in track(range(0, len(edges), CHUNK), "effects of single edges"):
        if work.clock.is_up:
            break
        names = edges[first : first + CHUNK]

        def make(names: list[str] = names) -> dict[str, Tensor]:
            with listening(_unheard):
                return {"mean": exact_effects(work.model, pairs, work.graph, metric, names).mean}

        for name, value in zip(names, work.stages.get(f"evidence-{first}", make)["mean"].tolist(), strict=True):
            effects[work.graph.edge(name)] = value
    return effects


def tail(work: Work, circuit: Circuit) -> Float[Tensor, " edge"]:
    """Measured effects of random edges that are not in the circuit: what the scores may have missed."""
    where = circuit.complement().edges.nonzero()
    drawn = torch.randperm(len(where), generator=torch_generator(work.seed, "tail"))[:N_TAIL]
    names = [work.graph.name(row, column) for row, column in where[drawn.sort().values].tolist()]
    pairs = work.pairs.take(range(n_evidence(work)))
    metric = work.metric.take(range(len(pairs)))
    if not names:
        return torch.zeros(0)
    return if_time(
        work, "tail", lambda: {"mean": exact_effects(work.model, pairs, work.graph, metric, names).mean}
    ).get("mean", torch.zeros(0))


def if_time(work: Work, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """A stage that is left out when the time is up."""
    return {} if work.clock.is_up else work.stages.get(name, make)


def completed(work: Work, circuit: Circuit) -> dict[str, Tensor]:
    """F of the circuit and of the model without sets of nodes."""
    few = work.pairs.take(range(min(N_FEW, len(work.pairs))))

    def make() -> dict[str, Tensor]:
        metric = work.metric.take(range(len(few)))
        found = completeness(work.model, few, circuit, metric, seed=work.seed)
        return {"circuit": found.circuit, "model": found.model}

    return if_time(work, "completeness", make)


def minimal(work: Work, circuit: Circuit) -> dict[str, float]:
    """Each node -> what it is worth; empty when the time is up."""
    few = work.pairs.take(range(min(N_FEW, len(work.pairs))))
    nodes = [name for name in circuit.nodes() if name != "logits"]
    if not nodes:
        return {}

    def make() -> dict[str, Tensor]:
        metric = work.metric.take(range(len(few)))
        return {"worth": torch.tensor(list(minimality(work.model, few, circuit, metric, seed=work.seed).values()))}

    worth = if_time(work, "minimality", make)
    return dict(zip(nodes, worth["worth"].tolist(), strict=True)) if worth else {}


def stable(work: Work, scores: EdgeScores) -> float | None:
    """Mean overlap of the circuits of resampled prompts; None where prompts cannot be resampled."""
    if scores.per_pair is None or len(work.pairs) < 2:
        return None

    def make() -> dict[str, Tensor]:
        return {"overlap": stability(scores, lambda s: choose(s, work.budget, work.select), seed=work.seed)}

    found = if_time(work, "stability", make)
    return float(found["overlap"].mean()) if found else None
