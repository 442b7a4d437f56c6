"""Which nodes of an attribution graph does the output hang on, and how much of it runs through errors?

    A_hat = |A| / row sum;  influence = w (A_hat + A_hat^2 + ...),  w = probabilities on logit rows
    replacement = inf(tokens) / (inf(tokens) + inf(errors))
    completeness = sum_n (inf_n + w_n) (1 - share of errors in row n) / sum_n (inf_n + w_n)
Edges only run from lower layers to higher ones, so the series is one sweep over the rows from the top layer down.
Pruning keeps the fewest nodes whose influence reaches a share of the total, then the fewest edges, then drops features
without incoming or outgoing edges and errors without outgoing ones; tokens and logits stay.
Source: E. Ameisen et al. 2025 and circuit-tracer's graph.py, which is the oracle of the tests.
Trap: influence counts sizes; two paths that cancel count twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.circuits.attribution_graph_value import AttributionGraph
from interp.core.errors import InterpError

BLOCK = 512
"""Rows normalised at once."""


@torch.no_grad()
def influence(
    rows: Float[Tensor, "row column"],
    level: Int[Tensor, " row"],
    node: Int[Tensor, " row"],
    weights: Float[Tensor, " row"],
) -> Float[Tensor, " column"]:
    """Influence of every column. `level`: layer of each row's node; `node`: its column, -1 where it has none."""
    found = rows.new_zeros(rows.shape[1])
    for own in level.unique(sorted=True).flip(0).tolist():
        for index in (level == own).nonzero().flatten().split(BLOCK):
            size = rows[index].abs()
            carried = torch.where(node[index] >= 0, found[node[index].clamp_min(0)], 0) + weights[index]
            found += (carried / size.sum(1).clamp_min(1e-10)) @ size
    return found


def columns_of_rows(graph: AttributionGraph) -> Int[Tensor, " row"]:
    """The column of each row's node; logits have none."""
    return torch.cat([torch.arange(graph.n_features), torch.full((graph.n_logits,), -1)])


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How well a graph explains its prompt."""

    replacement: float
    """Share of the end-to-end influence that comes from tokens rather than errors."""
    completeness: float
    """Share of incoming edges that come from features and tokens rather than errors, weighted by influence."""
    dropped: float
    """Share of incoming edges that come from features left out by the node budget, weighted likewise."""


@torch.no_grad()
def node_influence(graph: AttributionGraph) -> Float[Tensor, " column"]:
    """Influence of features, errors and tokens on the logits."""
    return influence(graph.edges, graph.levels(), columns_of_rows(graph), graph.weights())


@torch.no_grad()
def graph_scores(graph: AttributionGraph) -> Scores:
    """Replacement and completeness; nodes without incoming edges (errors, tokens) count as explained."""
    found = node_influence(graph)
    tokens, errors = found[graph.token_columns].sum(), found[graph.errors].sum()
    output = torch.cat([found[: graph.n_features], found.new_zeros(graph.n_logits)]) + graph.weights()
    size = graph.edges.abs().sum(1)
    share = graph.edges[:, graph.errors].abs().sum(1) / size.clamp_min(1e-10)
    total = output.sum() + tokens + errors
    lost = output * graph.rest_abs / (size + graph.rest_abs).clamp_min(1e-10)
    return Scores(
        replacement=float(tokens / (tokens + errors).clamp_min(1e-30)),
        completeness=float(1 - (output * share).sum() / total),
        dropped=float(lost.sum() / output.sum()),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Pruned:
    """What is left of a graph."""

    nodes: Int[Tensor, " kept"]
    """Numbers of the nodes that stay, ascending."""
    edges: Float[Tensor, "kept kept"]
    """Rows are targets; 0 where an edge was dropped."""
    cumulative: Float[Tensor, " node"]
    """For every node of the whole graph: influence of all nodes at least as influential, as a share of the total."""
    node_influence: Float[Tensor, " node"]
    node_threshold: float
    edge_threshold: float
    dropped_influence: float
    """Share of the influence of all nodes that belonged to dropped ones."""
    dropped_edges: float
    """Share of the edge scores among the nodes that stay that belonged to dropped edges."""


@torch.no_grad()
def prune(graph: AttributionGraph, *, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> Pruned:
    """Keep what the output hangs on."""
    for name, value in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
        if not 0 <= value <= 1:
            raise InterpError(f"{name}={value} must lie in 0..1; 0.8 and 0.98 are usual")
    found = torch.cat([node_influence(graph), graph.edges.new_zeros(graph.n_logits)])
    fixed = torch.zeros(graph.n_nodes, dtype=torch.bool)
    fixed[graph.n_features + graph.n_errors :] = True
    nodes = ((found >= _threshold(found, node_threshold)) | fixed).nonzero().flatten()
    small = _among(graph, nodes)
    weights = torch.zeros(len(nodes), dtype=small.dtype)
    weights[len(nodes) - graph.n_logits :] = graph.logit_probabilities.to(small.dtype)
    scores = _edge_scores(graph, nodes, small, weights)
    keep = scores >= _threshold(scores.flatten(), edge_threshold)
    stay = _connected(nodes, keep, fixed, graph.n_features)
    keep &= stay[:, None] & stay
    dropped = float(1 - scores[keep].sum() / scores.sum().clamp_min(1e-30))
    small = torch.where(keep, small, 0)[stay][:, stay]
    nodes = nodes[stay]
    return Pruned(
        nodes=nodes, edges=small, cumulative=_cumulative(found), node_influence=found, node_threshold=node_threshold,
        edge_threshold=edge_threshold, dropped_influence=float(1 - found[nodes].sum() / found.sum().clamp_min(1e-30)),
        dropped_edges=dropped,
    )  # fmt: skip


def _among(graph: AttributionGraph, nodes: Tensor) -> Float[Tensor, "kept kept"]:
    """The square matrix of some nodes."""
    out = graph.edges.new_zeros(len(nodes), len(nodes))
    n_columns = graph.edges.shape[1]
    is_source = nodes < n_columns
    for place, node in enumerate(nodes.tolist()):
        row = graph.row_of(node)
        if row is not None:
            out[place, is_source] = graph.edges[row, nodes[is_source]]
    return out


def _edge_scores(graph: AttributionGraph, nodes: Tensor, small: Tensor, weights: Tensor) -> Tensor:
    """A_hat[t, s] (influence_t + w_t), influence computed anew among the nodes that stay."""
    level = torch.tensor([graph.node(node).layer if graph.row_of(node) is not None else -1 for node in nodes.tolist()])
    has = level >= 0
    own = influence(small[has], level[has], has.nonzero().flatten(), weights[has])
    shares = small.abs() / small.abs().sum(1, keepdim=True).clamp_min(1e-10)
    return shares * (own + weights)[:, None]


def _connected(nodes: Tensor, keep: Bool[Tensor, "kept kept"], fixed: Tensor, n_features: int) -> Bool[Tensor, " kept"]:
    """Nodes that stay once features need edges on both sides and errors outgoing ones."""
    stay, always, feature = torch.ones(len(nodes), dtype=torch.bool), fixed[nodes], nodes < n_features
    while True:
        edges = keep & stay[:, None] & stay
        now = stay & (always | edges.any(0)) & (~feature | edges.any(1))
        if torch.equal(now, stay):
            return stay
        stay = now


def _threshold(scores: Tensor, share: float) -> Tensor:
    """The smallest score among the fewest that reach a share of the total."""
    ordered = scores.sort(descending=True).values
    cumulative = ordered.cumsum(0) / ordered.sum()
    return ordered[min(int(torch.searchsorted(cumulative, share)), len(ordered) - 1)]


def _cumulative(scores: Tensor) -> Tensor:
    ordered, order = scores.sort(descending=True)
    out = torch.zeros_like(scores)
    out[order] = ordered.cumsum(0) / ordered.sum()
    return out
