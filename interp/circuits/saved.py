"""A circuit back from the run that found it: graph, edges, scores, measured effects."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp.circuits.graph import Circuit, EdgeScores, Graph
from interp.circuits.nodes import destination_of, source_of
from interp.core.errors import ArtefactError, InterpError
from interp.core.result import Result
from interp.core.run import Run


@dataclass(frozen=True, kw_only=True, eq=False)
class SavedCircuit:
    """What a run of `circuit` holds."""

    result: Result
    circuit: Circuit
    scores: EdgeScores
    weights: Float[Tensor, "source destination"]
    """Measured effects; scores where no effect was measured."""


def saved_circuit(run: Run) -> SavedCircuit:
    """The circuit of a run. Raises InterpError for a run of something else."""
    result = next((each for each in run.results if each.method == "circuit"), None)
    if result is None:
        methods = ", ".join(each.method for each in run.results)
        raise InterpError(f"this run holds {methods}, no circuit; make one with: interp circuit find")
    return circuit_of(result)


def circuit_of(result: Result) -> SavedCircuit:
    """The circuit of a result of `circuit`, fresh or reloaded."""
    try:
        ends = result.tables["graph"]
        names = {end: ends.loc[ends["end"] == end, "name"].tolist() for end in ("source", "destination")}
        graph = _graph(names["source"], names["destination"])
        circuit = Circuit(graph, result.tensors["circuit"].values.bool())
        values = result.tensors["scores"].values.double()
        weights = _weights(result.tables["edges"], graph, values)
    except (LookupError, InterpError, ValueError) as error:
        raise ArtefactError(f"the circuit of this run is damaged: {error}") from error
    scores = EdgeScores(
        graph=graph, values=values, method=str(result.manifest.config["method"]),
        n_pairs=int(result.manifest.data["n_pairs"]),
    )  # fmt: skip
    return SavedCircuit(result=result, circuit=circuit, scores=scores, weights=weights)


def _graph(sources: list[str], destinations: list[str]) -> Graph:
    """The graph of these names; the size of a kv group follows from how many heads and groups there are."""
    made = [source_of(name) for name in sources], [destination_of(name) for name in destinations]
    n_heads = sum(source.kind == "head" for source in made[0])
    n_groups = sum(destination.kind == "k" for destination in made[1])
    return Graph.between(*made, n_heads // max(1, n_groups) or 1)


def _weights(edges: pd.DataFrame, graph: Graph, scores: Tensor) -> Tensor:
    weights = scores.clone()
    for name, effect in zip(edges["edge"].tolist(), edges["effect"].tolist(), strict=True):
        if not pd.isna(effect):
            weights[graph.edge(name)] = effect
    return torch.where(graph.possible, weights, 0.0)
