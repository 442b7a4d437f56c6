"""From scores to circuits: chosen edges by hand, greedy growth, and ACDC one edge at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from interp.circuits import prune
from interp.circuits.acdc import acdc
from interp.circuits.graph import Circuit, EdgeScores, Graph
from interp.circuits.running import Evaluator
from interp.core.errors import ArtefactError, InterpError
from interp.models.model import LoadedModel
from interp.tasks.base import PromptPairs
from interp.tasks.metrics import Divergence, Metric
from tests.circuits.test_running import logit_diff, random_circuit, small, some_pairs


def scored(graph: Graph, **edges: float) -> EdgeScores:
    values = torch.zeros(graph.possible.shape)
    for name, value in edges.items():
        values[graph.edge(name)] = value
    return EdgeScores(graph=graph, values=values, method="by hand", n_pairs=1)


GRAPH = Graph.make(2, 2, 1)
SCORES = scored(
    GRAPH,
    **{
        "embed->a0.h0.q": 5.0, "embed->a0.g0.v": -4.0, "a0.h1->m1": 3.0, "m1->logits": 1.0, "embed->logits": -0.5,
        "a0.h0->a1.h1.q": 6.0, "a1.h1->logits": 0.4,
    },
)  # fmt: skip


def test_top_and_threshold() -> None:
    assert list(prune.top(SCORES, 2)) == ["embed->a0.h0.q", "a0.h0->a1.h1.q"]
    assert set(prune.top(SCORES, 2, signed=True)) == {"embed->a0.g0.v", "embed->logits"}
    assert set(prune.threshold(SCORES, 4.0)) == {"embed->a0.h0.q", "embed->a0.g0.v", "a0.h0->a1.h1.q"}
    assert list(prune.threshold(SCORES, 0.6, signed=True)) == ["embed->a0.g0.v"]
    assert prune.top(SCORES, 0).size == 0 and prune.top(SCORES, GRAPH.n_edges).same(GRAPH.full())


def test_greedy_grows_from_the_logits() -> None:
    order = [
        "m1->logits",
        "a0.h1->m1",
        "embed->a0.g0.v",
        "embed->logits",
        "a1.h1->logits",
        "a0.h0->a1.h1.q",
        "embed->a0.h0.q",
    ]
    for n in range(len(order) + 1):
        assert set(prune.greedy(SCORES, n)) == set(order[:n])
    assert prune.greedy(SCORES, GRAPH.n_edges).same(GRAPH.full())


def test_greedy_and_connected_leave_no_loose_ends() -> None:
    for seed in range(5):
        values = torch.randn(GRAPH.possible.shape, generator=torch.Generator().manual_seed(seed))
        scores = EdgeScores(graph=GRAPH, values=values, method="random", n_pairs=1)
        grown = prune.connected(prune.greedy(scores, 12))
        assert grown.connected().same(grown)
        reachable = Circuit(GRAPH, prune.greedy(scores, 12).edges)
        for u, _ in reachable.edges.nonzero().tolist():
            assert reachable.edges[u].any()


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(InterpError, match="n=1000 edges of a graph that has"):
        prune.top(SCORES, 1000)
    with pytest.raises(InterpError, match="n=-1"):
        prune.greedy(SCORES, -1)
    with pytest.raises(InterpError, match="negative"):
        prune.threshold(SCORES, -1.0)


def one_at_a_time(
    model: LoadedModel, pairs: PromptPairs, graph: Graph, metric: Metric, tau: float, absolute: bool, start: Tensor
) -> Tensor:
    """The algorithm as it is told: every decision is a run of the whole model with the whole circuit."""
    evaluator, edges = Evaluator(model, pairs, graph), start.clone()

    def value(edges: Tensor) -> float:
        return float(evaluator.values([Circuit(graph, edges)], metric).mean())

    now = value(edges)
    for column in reversed(range(len(graph.destinations))):
        for row in reversed(range(len(graph.sources))):
            if edges[row, column]:
                without = edges.clone()
                without[row, column] = False
                new = value(without)
                damage = now - new
                if (abs(damage) if absolute else damage) < tau:
                    edges, now = without, new
    return edges


@pytest.mark.parametrize(
    ("family", "absolute", "kl", "tau"),
    [
        ("llama", True, False, 0.003),
        ("llama", False, True, 0.0003),
        ("gpt2", False, False, 0.003),
        ("gemma3", True, False, 0.003),
    ],
)
def test_acdc_is_one_edge_at_a_time(family: str, absolute: bool, kl: bool, tau: float) -> None:
    model = small(family)
    pairs, graph = some_pairs(model), Graph.of(model)
    metric = Divergence(reference=model(pairs.clean)[:, -1:].log_softmax(-1)) if kl else logit_diff(pairs)
    start = random_circuit(graph, 0.7, 0)
    found = acdc(model, pairs, graph, metric, tau, absolute=absolute, start=start)
    wanted = one_at_a_time(model, pairs, graph, metric, tau, absolute, start.edges)
    assert torch.equal(found.circuit.edges, wanted)
    assert found.n_left == 0 and 0 < found.circuit.size < start.size


def test_acdc_at_its_ends() -> None:
    model = small()
    pairs, graph = some_pairs(model), Graph.of(model)
    assert acdc(model, pairs, graph, logit_diff(pairs), 1e9).circuit.size == 0
    assert acdc(model, pairs, graph, logit_diff(pairs), 0.0, absolute=True).circuit.same(graph.full())
    with pytest.raises(InterpError, match="tau=-1"):
        acdc(model, pairs, graph, logit_diff(pairs), -1.0)


def test_acdc_goes_on_where_it_stopped(tmp_path: Path) -> None:
    model = small()
    pairs, graph, state = some_pairs(model), Graph.of(model), tmp_path / "acdc.json"
    metric = logit_diff(pairs)
    whole = acdc(model, pairs, graph, metric, 0.003, absolute=True)
    assert acdc(model, pairs, graph, metric, 0.003, absolute=True, resume=state).circuit.same(whole.circuit)
    stopped = acdc(model, pairs, graph, metric, 0.003, absolute=True, seconds=0.0, resume=tmp_path / "new.json")
    assert stopped.n_left == len(graph.destinations) and stopped.circuit.same(graph.full())
    kept = json.loads(state.read_text())
    assert kept["todo"] == [] and not list(tmp_path.glob(".*"))
    kept["todo"] = [0, 1, 2]
    state.write_text(json.dumps(kept))
    again = acdc(model, pairs, graph, metric, 0.003, absolute=True, resume=state)
    assert again.circuit.same(whole.circuit) and again.n_runs > whole.n_runs
    with pytest.raises(InterpError, match="belongs to another run"):
        acdc(model, pairs, graph, metric, 0.004, absolute=True, resume=state)
    state.write_text("{}")
    with pytest.raises(ArtefactError, match="not a state of acdc"):
        acdc(model, pairs, graph, metric, 0.003, resume=state)
