"""A circuit for other programs: a tidy table, JSON, DOT (Graphviz) and GraphML (networkx, Gephi, Cytoscape).

Nodes of DOT and GraphML are heads, MLPs, embedding and logits; an edge into a kv group is written once for each head of
the group that the circuit uses, with its input (`query`, `key`, `value`, `MLP`, ...) as an attribute. JSON keeps the
graph and can be read back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from interp.circuits.figure import drawn_edges
from interp.circuits.graph import Circuit
from interp.core.errors import ArtefactError, InterpError


def edge_table(circuit: Circuit, columns: Mapping[str, Float[Tensor, "source destination"]]) -> pd.DataFrame:
    """One row per edge in the order of the model, with one column for each matrix of numbers."""
    where = circuit.edges.nonzero()
    made: dict[str, list[Any]] = {
        "edge": list(circuit),
        "source": [circuit.graph.source_names[row] for row, _ in where.tolist()],
        "destination": [circuit.graph.destination_names[column] for _, column in where.tolist()],
    }
    for name, values in columns.items():
        made[name] = values[where[:, 0], where[:, 1]].double().tolist()
    return pd.DataFrame(made)


def to_json(circuit: Circuit, weights: Float[Tensor, "source destination"], **facts: Any) -> str:
    """The graph, the edges with their weights, and what else is to be kept."""
    listed = circuit.edges.nonzero().tolist()
    data = circuit.to_json() | {"weights": [float(weights[row, column]) for row, column in listed], **facts}
    try:
        return json.dumps(data, indent=1, allow_nan=False)
    except ValueError as error:
        raise InterpError(f"JSON cannot hold NaN or infinity: {error}") from error


def from_json(text: str) -> Circuit:
    """The circuit of `to_json`. Raises ArtefactError for anything else."""
    try:
        return Circuit.from_json(json.loads(text))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ArtefactError(f"this is not the JSON of a circuit: {type(error).__name__}: {error}") from error


def read_json(path: Path) -> Circuit:
    """The circuit in a file."""
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ArtefactError(f"could not read {path}: {error}") from error


def to_dot(circuit: Circuit, weights: Float[Tensor, "source destination"]) -> str:
    """Graphviz: blue edges are negative, red ones positive, width is weight; one rank per layer."""
    edges = drawn_edges(circuit, weights)
    most = max(map(abs, edges["weight"].tolist()), default=1.0)
    lines = ["digraph circuit {", "  rankdir=BT;", '  node [shape=box, fontname="Helvetica"];']
    ranks: dict[int, list[str]] = {}
    for name in dict.fromkeys([*edges["start"], *edges["end"]]):
        ranks.setdefault(_rank(circuit, name), []).append(name)
    for _, names in sorted(ranks.items()):
        lines.append(f"  {{ rank=same; {' '.join(f'{_quoted(name)};' for name in names)} }}")
    for start, end, via, weight in zip(edges["start"], edges["end"], edges["via"], edges["weight"], strict=True):
        width = 0.5 + 4.5 * abs(weight) / (most or 1.0)
        color = "#d9764f" if weight > 0 else "#5b8fc7"
        lines.append(
            f"  {_quoted(start)} -> {_quoted(end)} "
            f'[penwidth={width:.2f}, color="{color}", tooltip={_quoted(f"{via} {weight:+.4g}")}];'
        )
    return "\n".join([*lines, "}"]) + "\n"


def _rank(circuit: Circuit, name: str) -> int:
    if name == "logits":
        return 2 * circuit.graph.n_layers
    return circuit.graph.sources[circuit.graph.source(name)].when


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def to_graphml(circuit: Circuit, weights: Float[Tensor, "source destination"]) -> str:
    """GraphML with `layer` on nodes, and `input` and `weight` on edges."""
    edges = drawn_edges(circuit, weights)
    lines = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        '<graphml xmlns="http://graphml.graphdrawing.org/xmlns">',
        '  <key id="layer" for="node" attr.name="layer" attr.type="int"/>',
        '  <key id="input" for="edge" attr.name="input" attr.type="string"/>',
        '  <key id="weight" for="edge" attr.name="weight" attr.type="double"/>',
        '  <graph edgedefault="directed">',
    ]
    for name in dict.fromkeys([*edges["start"], *edges["end"]]):
        layer = _rank(circuit, name) // 2
        lines.append(f'    <node id={quoteattr(name)}><data key="layer">{layer}</data></node>')
    for i, row in enumerate(zip(edges["start"], edges["end"], edges["via"], edges["weight"], strict=True)):
        start, end, via, weight = row
        lines.append(
            f'    <edge id="e{i}" source={quoteattr(start)} target={quoteattr(end)}>'
            f'<data key="input">{escape(via)}</data><data key="weight">{weight!r}</data></edge>'
        )
    return "\n".join([*lines, "  </graph>", "</graphml>"]) + "\n"
