"""Planted models as tasks: their prompt pairs, and what was planted as a circuit of an edge graph (a helper)."""

from __future__ import annotations

from interp.circuits.graph import Circuit, Graph
from interp.models.toy.planted import Planted
from interp.tasks.base import Draft, PromptPairs, align


def planted_pairs(planted: Planted) -> PromptPairs:
    """The prompts of a planted model, aligned: every letter is a token."""
    drafts = [
        Draft(clean=clean, corrupt=corrupt, right=right, wrong=wrong, roles={})
        for clean, corrupt, right, wrong in planted.prompts
    ]
    return align(planted.model, drafts)


def planted_graph(planted: Planted) -> Graph:
    """The edge graph, with gate and up apart where the planted circuit tells them apart."""
    return Graph.of(planted.model, split_mlp=planted.split_mlp)


def planted_circuit(planted: Planted, graph: Graph | None = None) -> Circuit:
    """The edges that were planted."""
    return (graph or planted_graph(planted)).circuit(f"{source}->{to}" for source, to in planted.edges)
