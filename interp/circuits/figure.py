"""A circuit as a figure: layers from bottom to top, columns for the positions where nodes act, edges by weight.

`graph_tables` gives the nodes and the edges as tidy tables, which a `Panel` of kind `graph` draws in the report and in
notebooks. A kv group feeds several heads: an edge into it is drawn to each of its heads that the circuit uses. A node
stands in the column of the position (or role) that most of its weight goes through; without that, in one column.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from interp.circuits.graph import Circuit, Graph
from interp.core.result import Panel

VIA = {"q": "query", "k": "key", "v": "value", "mlp": "MLP", "gate": "gate", "up": "up", "logits": "logits"}


def graph_tables(
    circuit: Circuit,
    weights: Float[Tensor, "source destination"],
    *,
    places: Mapping[str, str] | None = None,
    columns: tuple[str, ...] = (),
    roles: Mapping[str, str] | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Nodes and edges for drawing.

    `places`: node -> the column it stands in; `columns`: their order from left to right; `roles`: node -> a label of
    what it does, written on it.
    """
    edges = drawn_edges(circuit, weights)
    names = list(dict.fromkeys([*edges["start"], *edges["end"]]))
    places, roles = places or {}, roles or {}
    rows = [_node(circuit.graph, name, places.get(name, ""), roles.get(name, ""), edges) for name in names]
    nodes = pd.DataFrame(rows, columns=["node", "label", "row", "row_label", "column", "detail"])
    order = {name: i for i, name in enumerate(columns)}
    nodes["place"] = [order.get(name, len(order)) for name in nodes["column"]]
    nodes = nodes.sort_values(["place", "row", "node"], kind="stable").drop(columns="place").reset_index(drop=True)
    return nodes, edges


def drawn_edges(circuit: Circuit, weights: Float[Tensor, "source destination"]) -> pd.DataFrame:
    """One row per line of the figure: `start` and `end` are nodes, `via` the input, `edge` the name in the graph."""
    graph, used = circuit.graph, set(circuit.nodes())
    rows: list[tuple[object, ...]] = []
    for row, column in circuit.edges.nonzero().tolist():
        destination = graph.destinations[column]
        heads = [graph.source_names[i] for i in graph.feeds[column].nonzero()[:, 0].tolist()]
        ends = [head for head in heads if head in used] or heads or ["logits"]
        rows += [
            (graph.name(row, column), graph.source_names[row], end, VIA[destination.kind], float(weights[row, column]))
            for end in ends
        ]
    return pd.DataFrame(rows, columns=["edge", "start", "end", "via", "weight"])


def _node(graph: Graph, name: str, place: str, role: str, edges: pd.DataFrame) -> tuple[object, ...]:
    ways = (edges.loc[edges["end"] == name], edges.loc[edges["start"] == name])
    detail = [role] if role else []
    for word, other, found in (("from", "start", ways[0]), ("to", "end", ways[1])):
        heaviest = found.reindex(found["weight"].abs().sort_values(ascending=False, kind="stable").index)[:4]
        listed = zip(heaviest[other], heaviest["via"], heaviest["weight"], strict=True)
        detail += [f"{word} {end} ({via}) {weight:+.3g}" for end, via, weight in listed]
        detail += [f"and {len(found) - 4} more {word}"] if len(found) > 4 else []
    label, row, row_label = _height(graph, name)
    return name, f"{label}\n{role}" if role else label, row, row_label, place, "\n".join(detail)


def _height(graph: Graph, name: str) -> tuple[str, int, str]:
    """Label, row and name of the row of a node."""
    if name == "logits":
        return "logits", 2 * graph.n_layers, "logits"
    source = graph.sources[graph.source(name)]
    if source.kind == "embed":
        return "embed", -1, "embedding"
    if source.kind == "mlp":
        return f"MLP {source.layer}", source.when, f"{source.layer} MLP"
    return f"{source.layer}.{source.head}", source.when, f"{source.layer} heads"


def graph_panel(title: str, *, value_label: str, reading: str, x_label: str = "") -> Panel:
    """The panel of tables `nodes` and `drawn`."""
    return Panel(
        title=title, kind="graph", table="drawn", nodes="nodes", x="start", y="end", value="weight", group="via",
        x_label=x_label, y_label="layer", value_label=value_label, reading=reading,
    )  # fmt: skip
