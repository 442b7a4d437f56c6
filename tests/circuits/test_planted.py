"""Planted circuits are found, decoys are not, and the table says so."""

import numpy as np
import pandas as pd
import pytest

from interp.circuits.contest import auroc, contest_row, planted_contest
from interp.circuits.evaluate import faithfulness
from interp.circuits.planted import planted_circuit, planted_graph, planted_pairs
from interp.core.errors import InterpError
from interp.models.toy.planted import planted, planted_names

FAST = ("eap", "eap-ig", "exact")


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return planted_contest(methods=FAST, n=12).set_index(["circuit", "method"])


@pytest.mark.parametrize("name", planted_names())
def test_the_planted_edges_are_all_that_is_needed(name: str) -> None:
    made = planted(name, 12, seed=5)
    graph, pairs = planted_graph(made), planted_pairs(made)
    truth = planted_circuit(made, graph)
    found = faithfulness(made.model, pairs, [truth, truth.complement()], pairs.metric("logit_diff"))
    assert found.mean[0] == pytest.approx(1.0, abs=0.05)
    assert found.mean[1] == pytest.approx(0.0, abs=0.05)
    assert truth.connected().same(truth)


@pytest.mark.parametrize("name", planted_names())
def test_integrated_gradients_find_every_planted_circuit(name: str, table: pd.DataFrame) -> None:
    row = table.loc[(name, "eap-ig")]
    assert row["auroc"] >= 0.99
    assert row["precision"] == row["recall"] == 1.0


def test_the_decoy_is_far_below_the_circuit(table: pd.DataFrame) -> None:
    assert table.loc[("decoy", "eap-ig"), "decoy"] < 0.1
    assert table.loc[("decoy", "exact"), "decoy"] < 0.1
    assert table["decoy"].notna().groupby("circuit").any().to_dict() == {n: n == "decoy" for n in planted_names()}


def test_one_at_a_time_misses_the_redundant_pair(table: pd.DataFrame) -> None:
    """Exact patching and gradients at the clean run agree: only the edge into the logits counts."""
    assert table.loc[("redundant", "exact"), "recall"] == pytest.approx(1 / 5)
    assert table.loc[("redundant", "eap"), "recall"] == pytest.approx(1 / 5)


@pytest.mark.slow
def test_all_methods_stand_in_one_table() -> None:
    table = planted_contest(n=12)
    assert set(table["circuit"]) == set(planted_names())
    best = table.groupby("circuit")["auroc"].max()
    assert (best >= 0.99).all()
    acdc = table[table["method"] == "acdc"].set_index("circuit")
    assert acdc.loc["redundant", "recall"] == pytest.approx(3 / 5), "one of the pair goes, the other must stay"
    assert (acdc.drop("redundant")["recall"] == 1).all()


def test_auroc_is_the_share_of_pairs_in_order() -> None:
    generator = np.random.default_rng(0)
    scores, truth = generator.integers(0, 4, 40).astype(float), generator.random(40) < 0.3
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[truth] for b in scores[~truth]]
    assert auroc(scores, truth) == pytest.approx(np.mean(pairs))
    with pytest.raises(InterpError, match="not"):
        auroc(scores, np.ones(40, dtype=bool))


def test_an_edge_above_the_cut_that_was_not_planted_costs_precision() -> None:
    made = planted("induction", 3)
    graph = planted_graph(made)
    truth = planted_circuit(made, graph)
    scores = truth.edges.double()
    scores[graph.edge("embed->logits")] = 0.06
    row = contest_row(scores, truth, gap=1.0)
    assert (row["precision"], row["recall"]) == (pytest.approx(5 / 6), 1.0)
    assert row["auroc"] == 1.0
