"""The method `circuit` on models whose circuit is known, and what the figure says about their nodes."""

import dataclasses

import pytest
import torch

from interp.circuits.find import CircuitConfig, load, run
from interp.circuits.graph import EdgeScores
from interp.circuits.places import columns, looks_at, positions
from interp.circuits.planted import planted_circuit, planted_pairs
from interp.circuits.saved import circuit_of, saved_circuit
from interp.core.errors import ArtefactError, InterpError
from interp.core.result import Result
from interp.core.run import Run
from interp.models.toy.planted import planted
from interp.tasks.base import Draft, align

CONFIG = CircuitConfig(task="planted", n_pairs=9, budget=9, n_random=2)


def found(name: str, **more: object) -> Result:
    model = planted(name, 1).model
    config = dataclasses.replace(CONFIG, **more)
    return run(model, load(model, config), config)


@pytest.mark.parametrize("method", ["eap-ig", "eap-ig-activations", "exact", "acdc"])
def test_every_method_finds_what_was_planted(method: str) -> None:
    result = found("negative", method=method)
    assert circuit_of(result).circuit.same(planted_circuit(planted("negative", 1)))
    assert result.headline["faithfulness"] == pytest.approx(1, abs=0.02)
    assert result.headline["faithfulness_of_the_rest"] == pytest.approx(0, abs=0.02)
    assert result.headline["n_nodes_needed"] == 4


def test_acdc_drops_what_is_not_needed_though_the_budget_would_allow_it() -> None:
    """Of eight edges asked for, those that ACDC kept come first."""
    result = found("induction", method="acdc", budget=8)
    best = result.tables["edges"]["edge"].head(5)
    assert set(best) == set(planted_circuit(planted("induction", 1)))


def test_acdc_ranks_edges_and_leaves_their_scores_alone() -> None:
    """Scores stay on the scale of the effects: else no random edge could count as missed."""
    by_gradient, by_acdc = (found("induction", method=method, budget=5) for method in ("eap-ig", "acdc"))
    scores = [result.tensors["scores"].values for result in (by_gradient, by_acdc)]
    torch.testing.assert_close(scores[1], scores[0])
    graph = circuit_of(by_acdc).circuit.graph
    values = torch.zeros(graph.possible.shape)
    kept = torch.zeros_like(graph.possible)
    for number, name in enumerate(["embed->logits", "embed->a0.h0.q", "embed->a0.h1.q"]):
        values[graph.edge(name)] = [-3.0, 1.0, -2.0][number]
    kept[graph.edge("embed->a0.h0.q")] = kept[graph.edge("embed->a0.h1.q")] = True
    made = EdgeScores(graph=graph, values=values, method="acdc", n_pairs=1, first=kept)
    assert [name for name, _ in made.top(3)] == ["embed->a0.h1.q", "embed->a0.h0.q", "embed->logits"]
    assert [name for name, _ in made.top(2, signed=True)] == ["embed->a0.h1.q", "embed->logits"]


def test_acdc_without_the_time_to_finish_says_so() -> None:
    result = found("induction", method="acdc", budget=5, minutes=1e-4)
    assert any("ACDC left the edges into" in note for note in result.notes)


def test_halves_of_a_gated_mlp_are_told_apart() -> None:
    result = found("mlp_gate", split_mlp=True, budget=4)
    assert set(circuit_of(result).circuit) == set(planted_circuit(planted("mlp_gate", 1)))
    assert {"gate", "up"} <= set(result.tables["drawn"]["via"])


def test_evidence_stands_beside_the_score_of_every_edge() -> None:
    result = found("redundant", budget=5)
    edges = result.tables["edges"].set_index("edge")
    assert edges["effect"].notna().all()
    assert abs(edges.loc["a0.h0->m1", "effect"]) < 0.1 * abs(edges.loc["a0.h0->m1", "score"]), "the other one is enough"
    assert edges.loc["m1->logits", "effect"] == pytest.approx(edges.loc["m1->logits", "score"], rel=0.05)


def test_greedy_circuits_hang_together() -> None:
    result = found("two_hop", select="greedy", budget=7)
    assert result.headline["n_edges"] == 7


def test_edges_that_lead_nowhere_are_no_circuit() -> None:
    with pytest.raises(InterpError, match="raise budget"):
        found("two_hop", budget=1)


@pytest.mark.parametrize(
    ("field", "value"), [("n_pairs", 0), ("budget", 0), ("n_random", 0), ("minutes", float("nan"))]
)
def test_numbers_that_make_no_sense_are_refused(field: str, value: float) -> None:
    with pytest.raises(InterpError, match=field):
        found("two_hop", **{field: value})


def test_a_model_that_cannot_do_the_task_is_refused() -> None:
    with pytest.raises(InterpError, match="right"):
        found("decoy", task="induction", min_accuracy=1.01)


def test_a_run_of_something_else_or_a_damaged_one_is_named() -> None:
    result = found("lookup", budget=4)
    other = dataclasses.replace(result, manifest=dataclasses.replace(result.manifest, method="massive"))
    with pytest.raises(InterpError, match="holds massive"):
        saved_circuit(Run(results=(other,), facts={}))
    tables = {name: table for name, table in result.tables.items() if name != "edges"}
    with pytest.raises(ArtefactError, match="damaged"):
        circuit_of(dataclasses.replace(result, tables=tables, panels=()))
    again = circuit_of(result)
    assert again.circuit.graph.same(planted_circuit(planted("lookup", 1)).graph)


def test_nodes_stand_where_they_act_and_say_what_they_look_at() -> None:
    """The lookup head acts at the last position and looks at the fact that is asked for."""
    made = planted("lookup", 4)
    drafts = []
    for clean, corrupt, right, wrong in made.prompts:
        fact = next(i for i in range(1, 5) if (ord(clean[i]) - ord("A")) // 4 == int(clean[5]))
        drafts.append(Draft(clean=clean, corrupt=corrupt, right=right, wrong=wrong, roles={"FACT": fact}))
    pairs = align(made.model, drafts)
    truth = planted_circuit(made)
    mass = torch.zeros(6, *truth.edges.shape)
    mass[5, truth.graph.source("a0.h2")] = truth.edges[truth.graph.source("a0.h2")].float()
    mass[2, truth.graph.source("embed")] = 0.5
    places = positions(truth, mass)
    assert places == {"embed": 2, "a0.h2": 5, "logits": 5}
    assert looks_at(made.model, pairs, places) == {"a0.h2": "to FACT"}
    named, order = columns(pairs, places)
    assert named["a0.h2"] == named["logits"] == order[-1] == "5 END"
    assert len(planted_pairs(made)) == 4
