"""How is an attribution graph exchanged with circuit-tracer and Neuronpedia? As their JSON file, read and written here.

    {metadata {slug, scan, transcoder_list, prompt_tokens, prompt, node_threshold, schema_version: 1},
     qParams {pinnedIds, supernodes, linkType, clickedId, sg_pos}, nodes [...], links [{source, target, weight}]}
Node ids: features "LAYER_NUMBER_POS" (`feature` is the Cantor pair of layer and number), errors "0_LAYER_POS" with
feature -1, tokens "E_TOKEN_POS", logits "LAYERS+1_TOKEN_POS". An error's id may be that of a feature of layer 0: then
it is written as "error_LAYER_POS" here; circuit-tracer writes the same id twice, which is seen when it is read.
Beside the file lies `graph-metadata.json`, the list of graphs of the folder. All text is ASCII and <, >, & are written
as \\u003c, \\u003e, \\u0026, so that a page can hold the file inside a script element.
Source: https://github.com/safety-research/circuit-tracer, frontend/graph_models.py; its objects are the tests' oracle.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor

from interp.circuits.attribution_graph_scores import Pruned
from interp.circuits.attribution_graph_value import AttributionGraph
from interp.core.errors import ArtefactError, InterpError

FEATURE, ERROR, TOKEN, LOGIT = "cross layer transcoder", "mlp reconstruction error", "embedding", "logit"
INDEX = "graph-metadata.json"
SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
MAX_BYTES = 2**30
"""Larger files are refused: they are no pruned graphs."""


@dataclass(frozen=True, kw_only=True)
class FileNode:
    """One node, by the words of the file."""

    node_id: str
    feature: int
    layer: str
    ctx_idx: int
    feature_type: str
    jsNodeId: str
    token_prob: float = 0.0
    is_target_logit: bool = False
    run_idx: int = 0
    reverse_ctx_idx: int = 0
    clerp: str = ""
    """The label that people see."""
    influence: float | None = None
    """Share of the total influence of all nodes at least as influential."""
    activation: float | None = None
    more: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Entries that other writers add."""

    @property
    def number(self) -> int:
        """Of a feature within its layer."""
        return cantor_unpair(self.feature)[1] if self.feature_type == FEATURE else self.feature


@dataclass(frozen=True, kw_only=True)
class FileLink:
    """One edge."""

    source: str
    target: str
    weight: float


@dataclass(frozen=True, kw_only=True)
class GraphFile:
    """What a file holds."""

    metadata: Mapping[str, Any]
    q_params: Mapping[str, Any]
    nodes: tuple[FileNode, ...]
    links: tuple[FileLink, ...]

    @property
    def ambiguous(self) -> tuple[str, ...]:
        """Ids that two nodes share: links to them cannot be told apart."""
        counts = Counter(node.node_id for node in self.nodes)
        return tuple(name for name, n in counts.items() if n > 1)

    def matrix(self) -> Float[Tensor, "node node"]:
        """Edges between the nodes in their order, rows are targets. Raises ArtefactError where ids are ambiguous."""
        if self.ambiguous:
            raise ArtefactError(f"two nodes are called {self.ambiguous[0]!r}; links to them cannot be told apart")
        place = {node.node_id: i for i, node in enumerate(self.nodes)}
        out = torch.zeros(len(self.nodes), len(self.nodes), dtype=torch.float64)
        for link in self.links:
            out[place[link.target], place[link.source]] += link.weight
        return out


def cantor_pair(a: int, b: int) -> int:
    """One number for two: (a + b)(a + b + 1) / 2 + b."""
    return (a + b) * (a + b + 1) // 2 + b


def cantor_unpair(pair: int) -> tuple[int, int]:
    """The two numbers of a pair."""
    w = (math.isqrt(8 * pair + 1) - 1) // 2
    b = pair - w * (w + 1) // 2
    return w - b, b


def graph_file(
    graph: AttributionGraph,
    pruned: Pruned,
    *,
    slug: str,
    scan: str,
    prompt: str,
    labels: Mapping[int, str] | None = None,
) -> GraphFile:
    """A pruned graph in the words of the file. `scan` names the transcoders; `labels`: node number -> text to show."""
    labels = labels or {}
    nodes = [_node(graph, pruned, int(node), labels.get(int(node), "")) for node in pruned.nodes]
    twice = {n.node_id for n in nodes if n.feature_type == FEATURE} & {
        n.node_id for n in nodes if n.feature_type == ERROR
    }
    names = [f"error_{n.layer}_{n.ctx_idx}" if n.feature_type == ERROR and n.node_id in twice else n.node_id
             for n in nodes]  # fmt: skip
    targets, sources = pruned.edges.nonzero(as_tuple=True)
    links = tuple(
        FileLink(source=names[s], target=names[t], weight=float(pruned.edges[t, s]))
        for t, s in zip(targets.tolist(), sources.tolist(), strict=True)
    )
    used = {name for link in links for name in (link.source, link.target)}
    return GraphFile(
        metadata={
            "slug": slug, "scan": scan, "transcoder_list": [], "prompt_tokens": list(graph.strings), "prompt": prompt,
            "node_threshold": pruned.node_threshold, "schema_version": 1,
        },
        q_params={"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        nodes=tuple(
            replace(n, node_id=name)
            for n, name in zip(nodes, names, strict=True)
            if name in used or n.feature_type in (TOKEN, LOGIT)
        ),
        links=links,
    )  # fmt: skip


def _node(graph: AttributionGraph, pruned: Pruned, index: int, label: str) -> FileNode:
    node, influence = graph.node(index), float(pruned.cumulative[index])
    layer, pos, number = node.layer, node.pos, node.number
    if node.kind == "feature":
        return FileNode(
            node_id=f"{layer}_{number}_{pos}", feature=cantor_pair(layer, number), layer=str(layer), ctx_idx=pos,
            feature_type=FEATURE, jsNodeId=f"{layer}_{number}-0", influence=influence, clerp=label,
            activation=float(graph.values[index]),
        )  # fmt: skip
    if node.kind == "error":
        return FileNode(node_id=f"0_{layer}_{pos}", feature=-1, layer=str(layer), ctx_idx=pos, feature_type=ERROR,
                        jsNodeId=f"{layer}_{pos}-0", influence=influence, clerp=label)  # fmt: skip
    if node.kind == "token":
        return FileNode(node_id=f"E_{number}_{pos}", feature=pos, layer="E", ctx_idx=pos, feature_type=TOKEN,
                        jsNodeId=f"E_{number}-{pos}", influence=influence, clerp=label)  # fmt: skip
    place = index - (graph.n_nodes - graph.n_logits)
    p, top = float(graph.logit_probabilities[place]), graph.n_layers + 1
    return FileNode(
        node_id=f"{top}_{number}_{pos}", feature=number, layer=str(top), ctx_idx=pos, feature_type=LOGIT,
        jsNodeId=f"L_{number}-{pos}", token_prob=p, is_target_logit=place == 0,
        clerp=f'Output "{graph.logit_strings[place]}" (p={p:.3f})',
    )  # fmt: skip


def write_graph(file: GraphFile, folder: Path | str) -> Path:
    """Write `SLUG.json` into a folder and list it in the folder's index; an older graph of this name is replaced."""
    folder, slug = Path(folder), str(file.metadata.get("slug", ""))
    if not SLUG.fullmatch(slug) or f"{slug}.json" == INDEX:
        raise InterpError(f"slug={slug!r} becomes a file name; use letters, digits, '.', '_' and '-'")
    if file.ambiguous:
        raise InterpError(f"two nodes are called {file.ambiguous[0]!r}; give each an id of its own")
    index = _read_index(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{slug}.json"
        _write(path, _plain(file))
        others = [own for own in index if own.get("slug") != slug]
        _write(folder / INDEX, {"graphs": [*others, dict(file.metadata)]})
    except (OSError, ValueError) as error:
        raise ArtefactError(f"could not write {folder}: {error}; free space or choose another folder") from error
    return path


def read_graph(path: Path | str) -> GraphFile:
    """Read a graph of circuit-tracer, Neuronpedia or this package. Raises ArtefactError for anything else."""
    path = Path(path)
    return parse_graph(_read(path), str(path))


def parse_graph(value: object, path: str) -> GraphFile:
    """What a file holds, from its JSON; `path` is named in errors."""
    raw = _object(value, path)
    for name in ("metadata", "nodes", "links"):
        if name not in raw:
            raise ArtefactError(f"{path} is no attribution graph: it has no {name!r}")
    nodes = tuple(_parsed(_object(item, f"a node of {path}"), path) for item in _items(raw["nodes"], path))
    names = {node.node_id for node in nodes}
    links: list[FileLink] = []
    for item in _items(raw["links"], path):
        link = _object(item, f"a link of {path}")
        try:
            made = FileLink(source=str(link["source"]), target=str(link["target"]), weight=float(link["weight"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ArtefactError(f"{path} has the link {link}, expected source, target and weight") from error
        if not {made.source, made.target} <= names:
            raise ArtefactError(f"{path} links {made.source!r} to {made.target!r}, one of which is no node")
        links.append(made)
    metadata = _object(raw["metadata"], f"metadata of {path}")
    return GraphFile(metadata=metadata, q_params=_object(raw.get("qParams", {}), f"qParams of {path}"), nodes=nodes,
                     links=tuple(links))  # fmt: skip


_TYPES: dict[str, tuple[Literal["int", "float", "bool", "str"], bool]] = {
    "node_id": ("str", True), "feature": ("int", True), "layer": ("str", True), "ctx_idx": ("int", True),
    "feature_type": ("str", True), "jsNodeId": ("str", False), "token_prob": ("float", False),
    "is_target_logit": ("bool", False), "run_idx": ("int", False), "reverse_ctx_idx": ("int", False),
    "clerp": ("str", False), "influence": ("float", False), "activation": ("float", False),
}  # fmt: skip
"""Entries of a node: type, and whether it must be there."""


def _parsed(raw: Mapping[str, Any], path: str) -> FileNode:
    known: dict[str, Any] = {}
    for name, (kind, needed) in _TYPES.items():
        value = raw.get(name)
        if value is None:
            if needed:
                raise ArtefactError(f"{path} has a node without {name!r}: {str(dict(raw))[:120]}")
            continue
        fits = {"int": int, "float": (int, float), "bool": bool, "str": (str, int)}[kind]
        if not isinstance(value, fits) or (isinstance(value, bool) and kind != "bool"):
            raise ArtefactError(f"{path} has a node with {name}={value!r}, expected {kind}")
        known[name] = str(value) if kind == "str" else float(value) if kind == "float" else value
    known.setdefault("jsNodeId", known["node_id"])
    return FileNode(**known, more={name: value for name, value in raw.items() if name not in _TYPES})


def _plain(file: GraphFile) -> dict[str, Any]:
    nodes = [{**{name: value for name, value in vars(n).items() if name != "more"}, **n.more} for n in file.nodes]
    links = [vars(link) for link in file.links]
    return {"metadata": dict(file.metadata), "qParams": dict(file.q_params), "nodes": nodes, "links": links}


def _write(path: Path, value: Mapping[str, Any]) -> None:
    text = json.dumps(value, indent=2, allow_nan=False)  # ASCII: also the line separators that end a script's line
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text + "\n", encoding="utf-8")
    draft.replace(path)


def _read(path: Path) -> object:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ArtefactError(f"{path} is larger than {MAX_BYTES} bytes; that is no pruned graph")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtefactError(f"{path} does not exist") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ArtefactError(f"{path} is damaged: {error}") from error


def _read_index(folder: Path) -> list[dict[str, Any]]:
    path = folder / INDEX
    if not path.exists():
        return []
    return [_object(item, str(path)) for item in _items(_object(_read(path), str(path)).get("graphs", []), str(path))]


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ArtefactError(f"{what} is {str(value)[:80]!r}, expected a JSON object")
    return cast("dict[str, Any]", value)


def _items(value: object, path: str) -> Sequence[Any]:
    if not isinstance(value, list):
        raise ArtefactError(f"{path} has {str(value)[:80]!r} where a list was expected")
    return cast("list[Any]", value)
