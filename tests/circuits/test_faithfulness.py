"""Curves, areas, completeness, minimality and controls, on circuits that are known."""

import numpy as np
import pytest
import torch

from interp.circuits.controls import degree_matched, draw_controls, random_circuit, stability
from interp.circuits.evaluate import faithfulness
from interp.circuits.faithfulness import area, choose, completeness, curve, minimality, node_sets
from interp.circuits.graph import Circuit, EdgeScores, Graph
from interp.circuits.planted import planted_circuit, planted_graph, planted_pairs
from interp.core.errors import InterpError
from interp.core.seed import torch_generator
from interp.models.toy.planted import Planted, planted


def known(name: str = "induction", n: int = 9) -> tuple[Planted, Circuit, EdgeScores]:
    """A planted model, its circuit, and scores that rank the circuit first."""
    made = planted(name, n)
    graph = planted_graph(made)
    truth = planted_circuit(made, graph)
    noise = torch.rand(graph.possible.shape, generator=torch_generator(0, "noise")) * 0.1
    values = torch.where(truth.edges, -1.0 - noise, noise) * graph.possible
    return made, truth, EdgeScores(graph=graph, values=values.double(), method="known", n_pairs=n)


def test_area_by_hand() -> None:
    assert area((0.0, 0.5, 1.0), (0.0, 1.0, 1.0)) == pytest.approx(0.75)
    assert area((0.001, 1.0), (1.0, 1.0)) == pytest.approx(0.999)


def test_a_right_ranking_is_faithful_as_soon_as_the_circuit_is_in() -> None:
    made, truth, scores = known()
    pairs = planted_pairs(made)
    shares = (0.01, truth.size / truth.graph.n_edges, 0.5, 1.0)
    found = curve(made.model, pairs, scores, pairs.metric("logit_diff"), shares=shares)
    assert found.sizes == (1, truth.size, 55, 110)
    assert found.values.tolist() == pytest.approx([0, 1, 1, 1], abs=0.02)
    assert found.cmd == pytest.approx(area(shares, [1, 0, 0, 0]), abs=0.02)
    assert found.cpr == pytest.approx(area(shares, [0, 1, 1, 1]), abs=0.02)


def test_signed_choice_leaves_out_what_works_against() -> None:
    """The head that takes 40 % of the answer away: without it the circuit does better than the model."""
    made, truth, _ = known("negative")
    against = ["a1.h2->a2.h1.q", "a1.h2->a2.g1.k", "a1.h2->a2.g1.v", "a2.h1->logits"]
    values = torch.where(truth.edges, -1.0, 0.0)
    for name in against:
        values[truth.graph.edge(name)] = 1.0
    scores = EdgeScores(graph=truth.graph, values=values.double(), method="known", n_pairs=9)
    pairs = planted_pairs(made)
    assert set(choose(scores, 5, signed=True)) == set(truth) - set(against)
    found = curve(made.model, pairs, scores, pairs.metric("logit_diff"), signed=True, shares=(5 / 262, 1.0))
    assert found.values.tolist() == pytest.approx([1 / 0.6, 1.0], abs=0.1)


def test_the_true_circuit_is_complete_and_minimal() -> None:
    made, truth, _ = known()
    pairs = planted_pairs(made)
    metric = pairs.metric("logit_diff")
    assert completeness(made.model, pairs, truth, metric, n_random=4).worst < 0.05
    needed = minimality(made.model, pairs, truth, metric)
    assert set(needed) == {"embed", "a0.h1", "a1.h2"}
    assert needed["a1.h2"] == pytest.approx(1.0, abs=0.05)
    assert needed["a0.h1"] == pytest.approx(1 / 3, abs=0.05), "one corruption of three goes through it"
    more = truth.with_edges("embed->m0", "m0->logits")
    assert minimality(made.model, pairs, more, metric)["m0"] < 0.01


def test_half_of_a_redundant_pair_is_faithful_but_not_complete() -> None:
    """What the IOI paper's test is for: the other half shows when the first is taken out of both."""
    made, truth, _ = known("redundant")
    pairs = planted_pairs(made)
    metric = pairs.metric("logit_diff")
    half = truth.without("embed->a0.g2.v", "a0.h2->m1")
    assert float(faithfulness(made.model, pairs, half, metric).mean) > 0.95
    found = completeness(made.model, pairs, half, metric, n_random=0)
    assert found.worst > 0.9
    assert ("a0.h0",) in found.sets


def test_node_sets_are_layers_and_draws() -> None:
    _, truth, _ = known()
    sets = node_sets(truth, 3, seed=0)
    assert sets[:2] == [("a0.h1",), ("a1.h2",)]
    assert len(sets) == 5
    assert node_sets(truth.graph.empty(), 3, seed=0) == []


def test_random_circuits_have_the_size_and_no_favourites() -> None:
    graph = Graph.make(2, 4)
    drawn = [random_circuit(graph, 30, torch_generator(0, i)) for i in range(200)]
    assert {circuit.size for circuit in drawn} == {30}
    often = torch.stack([circuit.edges for circuit in drawn]).double().mean(0)[graph.possible]
    share = 30 / graph.n_edges
    assert (often - share).abs().max() < 5 * np.sqrt(share * (1 - share) / 200)
    with pytest.raises(InterpError, match="has 110"):
        random_circuit(graph, 111, torch_generator(0))


def test_matched_circuits_keep_every_degree_and_change_the_edges() -> None:
    graph = Graph.make(6, 4, 2)
    circuit = random_circuit(graph, 60, torch_generator(1))
    other = degree_matched(circuit, torch_generator(2))
    assert torch.equal(circuit.edges.sum(0), other.edges.sum(0))
    assert torch.equal(circuit.edges.sum(1), other.edges.sum(1))
    assert (circuit & other).size < 40
    for few in (graph.empty(), graph.circuit(["embed->logits"])):
        assert degree_matched(few, torch_generator(3)).same(few)


def test_a_draw_is_the_same_in_any_batch() -> None:
    _, truth, _ = known()
    for kind in ("random", "degree-matched"):
        whole = draw_controls(kind, truth, 4, seed=0)
        parts = [*draw_controls(kind, truth, 2, seed=0), *draw_controls(kind, truth, 2, seed=0, first=2)]
        assert all(a.same(b) for a, b in zip(whole, parts, strict=True))


def test_stability_is_one_where_prompts_agree_and_chance_where_they_do_not() -> None:
    graph = Graph.make(2, 4)
    same = torch.rand(graph.possible.shape, generator=torch_generator(0)) * graph.possible
    agree = EdgeScores(graph=graph, values=same, method="x", n_pairs=6, per_pair=same.expand(6, *same.shape))
    assert stability(agree, lambda s: choose(s, 11), n=5).tolist() == [1.0] * 10
    noise = torch.randn(40, *graph.possible.shape, generator=torch_generator(1)) * graph.possible
    differ = EdgeScores(graph=graph, values=noise.mean(0), method="x", n_pairs=40, per_pair=noise)
    assert stability(differ, lambda s: choose(s, 11), n=30).mean() < 0.6
    with pytest.raises(InterpError, match="per_pair"):
        stability(EdgeScores(graph=graph, values=same, method="x", n_pairs=6), lambda s: choose(s, 11))
