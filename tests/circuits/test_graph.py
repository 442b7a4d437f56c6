"""Graphs and circuits: which edges exist, names, sets of edges, what hangs together."""

from __future__ import annotations

import json

import pytest
import torch

from interp.circuits.graph import Circuit, EdgeScores, Graph
from interp.circuits.nodes import Destination, Source, destination_of, source_of
from interp.core.errors import InterpError
from interp.models.tiny import tiny_model


def test_counts_of_a_grouped_model() -> None:
    graph = Graph.make(30, 9, 3)
    assert (len(graph.sources), len(graph.destinations), graph.n_edges) == (301, 481, 70_651)


def test_counts_by_hand() -> None:
    # Sources: embed, 2 heads, MLP; destinations: 2 q, 1 k, 1 v see embed; the MLP sees 3; the logits see 4.
    assert Graph.make(1, 2, 1).n_edges == 4 * 1 + 3 + 4
    assert Graph.make(1, 2, 1, split_mlp=True).n_edges == 4 * 1 + 2 * 3 + 4
    assert Graph.make(2, 2, 1, mlp=False).n_edges == 4 * 1 + 4 * 3 + 5


def test_an_edge_goes_forward_in_time() -> None:
    graph = Graph.make(2, 2)
    assert graph.possible[graph.edge("a0.h1->m0")]
    assert graph.possible[graph.edge("m0->a1.g0.k")]
    assert graph.possible[graph.edge("m1->logits")]
    for backwards in ("a0.h1->a0.h0.q", "m0->m0", "m1->a1.h0.q", "m0->a0.g0.v"):
        with pytest.raises(InterpError, match="not computed before"):
            graph.edge(backwards)


def test_a_group_feeds_its_heads_only() -> None:
    graph = Graph.make(2, 4, 2)
    assert [graph.destination_names[i] for i in graph.inputs("a1.h2")] == ["a1.h2.q", "a1.g1.k", "a1.g1.v"]
    assert graph.feeds[graph.destination("a1.g0.v")].sum() == 2


@pytest.mark.parametrize("name", ["embed", "a3.h1", "m5"])
def test_source_names_round_trip(name: str) -> None:
    assert str(source_of(name)) == name


@pytest.mark.parametrize("name", ["a3.h1.q", "a3.g0.k", "a3.g12.v", "m5", "m5.gate", "m5.up", "logits"])
def test_destination_names_round_trip(name: str) -> None:
    assert str(destination_of(name)) == name


@pytest.mark.parametrize("name", ["a3.h1.k", "a3.g0.q", "a3.h1", "embed", "m5.down", ""])
def test_what_is_no_destination(name: str) -> None:
    with pytest.raises(InterpError, match="no destination"):
        destination_of(name)


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(InterpError, match=r"unknown source 'a9.h1'; nearest: .*a0.h1"):
        Graph.make(1, 2).source("a9.h1")


def test_json_round_trip() -> None:
    graph = Graph.make(2, 4, 2, split_mlp=True)
    circuit = graph.circuit(["embed->a0.h1.q", "m0->m1.gate", "a1.h3->logits"])
    again = Circuit.from_json(json.loads(json.dumps(circuit.to_json())))
    assert again.graph.same(graph) and again.same(circuit)
    assert Circuit.from_json(circuit.to_json(), graph).same(circuit)


def test_sets_of_edges() -> None:
    graph = Graph.make(1, 2)
    one, two = graph.circuit(["embed->m0"]), graph.circuit(["embed->m0", "m0->logits"])
    assert one.union(two).size == 2 and (one & two).same(one) and list(two - one) == ["m0->logits"]
    assert two.complement().size == graph.n_edges - 2
    assert "embed->m0" in one and "m0->logits" not in one
    assert two.without("m0").size == 0
    assert list(two.without("embed->m0")) == ["m0->logits"]
    assert graph.full().without("a0.h1").complement().size == 2
    assert two.nodes() == ["embed", "m0", "logits"]
    with pytest.raises(InterpError, match="different graphs"):
        one.union(Graph.make(2, 2).empty())


def test_connected_keeps_paths_through_grouped_heads() -> None:
    graph = Graph.make(2, 4, 2)
    path = ["embed->a0.g1.v", "a0.h3->m1", "m1->logits"]
    loose = ["a0.h1->m1", "embed->a1.h0.q", "m0->logits", "a0.h3->a1.h2.q"]
    assert list(graph.circuit([*path, *loose]).connected()) == path
    assert graph.circuit(loose).connected().size == 0
    assert graph.full().connected().same(graph.full())


def test_edges_that_do_not_exist_are_refused() -> None:
    graph = Graph.make(1, 2)
    with pytest.raises(InterpError, match="no edge a0.h0->a0.h0.q"):
        Circuit(graph, torch.ones_like(graph.possible))


def test_of_a_model() -> None:
    graph = Graph.of(tiny_model("llama"), split_mlp=True)
    assert graph.same(Graph.make(3, 4, 2, split_mlp=True))
    assert Graph.of(tiny_model("gpt2", n_kv_heads=None)).same(Graph.make(3, 4))


@pytest.mark.parametrize("family", ["mamba", "mixtral"])
def test_what_has_no_graph(family: str) -> None:
    with pytest.raises(InterpError, match="heads|experts"):
        Graph.of(tiny_model(family))


def test_scores_are_ranked_by_magnitude_or_sign() -> None:
    graph = Graph.make(1, 1)
    values = torch.zeros(graph.possible.shape)
    values[graph.edge("embed->m0")] = -1.0
    values[graph.edge("m0->logits")] = 3.0
    scores = EdgeScores(graph=graph, values=values, method="eap", n_pairs=1)
    assert scores.top(2) == [("m0->logits", 3.0), ("embed->m0", -1.0)]
    assert scores.top(1, signed=True) == [("embed->m0", -1.0)]
    assert scores["m0->logits"] == 3.0
    assert len(scores.ranked()) == graph.n_edges


def test_values_are_values() -> None:
    assert Source("head", 1, 2) == source_of("a1.h2") and Destination("q", 1, 2).node == "a1.h2"
