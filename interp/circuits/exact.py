"""Exact patching: by how much the metric changes when one edge, or one source, carries the corrupted run's value.

    effect(u -> v) = M(clean run in which v reads its stream + z_u,corrupt - z_u,clean) - M(clean)
    effect(u)      = M(clean run in which all after u read that) - M(clean)
with everything after v computed again (K. Wang et al. 2023, https://arxiv.org/abs/2211.00593; the same as resample
ablation of the edge). A patch changes nothing before v's layer, so the layers are walked once for many edges: at each,
the edges that end there join a growing batch of streams. Cost: from v's layer on, one forward row for each edge and
pair; all edges of a real model take hours, so name those that matter, or use `interp.circuits.calibration`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from interp.circuits.graph import Circuit, EdgeScores, Graph
from interp.circuits.streams import Differences, Streams, batches, budget_of, check_graph, stream_bytes
from interp.core.errors import InterpError
from interp.core.progress import track
from interp.models.model import LoadedModel
from interp.tasks.base import PromptPairs
from interp.tasks.metrics import Metric

TOKENS_PER_PASS = 2048
"""Positions computed together, at most: bounds memory and keeps the products near the processor."""
LOGITS_PER_PASS = 128
"""Rows whose logits are held at once: the vocabulary is wide."""

Edges = Circuit | Sequence[str]


@dataclass(frozen=True, kw_only=True, eq=False)
class Effects:
    """Measured effects of single edges or sources."""

    names: tuple[str, ...]
    values: Float[Tensor, "patch pair"]
    """Metric with the edge or source patched, minus that of the clean run."""
    clean: Float[Tensor, " pair"]
    """Metric of the clean run."""
    corrupt: Float[Tensor, " pair"]

    @property
    def mean(self) -> Float[Tensor, " patch"]:
        return self.values.mean(1)


def exact_effects(
    model: LoadedModel, pairs: PromptPairs, graph: Graph, metric: Metric, edges: Edges, *, budget: int | None = None
) -> Effects:
    """Patch each edge alone, by name (`a3.h1->logits`) or all of a circuit."""
    wanted = [graph.edge(name) for name in edges]
    if not wanted:
        raise InterpError("no edges were asked for; name some, e.g. ['embed->logits']")
    return _measured(model, pairs, graph, metric, _wave, wanted, [graph.name(*edge) for edge in wanted], budget)


def exact_nodes(
    model: LoadedModel,
    pairs: PromptPairs,
    graph: Graph,
    metric: Metric,
    nodes: Sequence[str] | None = None,
    *,
    budget: int | None = None,
) -> Effects:
    """Patch each source alone, at all positions; by default every head and MLP."""
    names = list(nodes) if nodes is not None else list(graph.source_names[1:])
    wanted = [(graph.source(name), graph.source(name)) for name in names]
    return _measured(model, pairs, graph, metric, _node_wave, wanted, names, budget)


Wave = Callable[[Streams, Differences, Graph, Metric, Sequence[tuple[int, int]]], Tensor]
"""Patches, sorted by the second number, to the metric of each patch and pair."""


def _measured(
    model: LoadedModel, pairs: PromptPairs, graph: Graph, metric: Metric, wave_of: Wave,
    wanted: Sequence[tuple[int, int]], names: Sequence[str], budget: int | None,
) -> Effects:  # fmt: skip
    dtype, limit = torch.promote_types(model.dtype, torch.float32), budget_of(budget)
    values = torch.zeros(len(wanted), len(pairs), dtype=dtype)
    ends = [torch.zeros(len(pairs), dtype=dtype) for _ in range(2)]
    order = sorted(range(len(wanted)), key=lambda i: wanted[i][1])
    for batch in batches(pairs, stream_bytes(model, pairs) * graph.n_layers * 14, limit):
        streams = Streams.of(model, pairs.take(batch), n_last=metric.n_last, first=batch.start)
        check_graph(streams, graph)
        differences = Differences(streams, limit)
        per_wave = max(1, TOKENS_PER_PASS // streams.clean.before[0].flatten(0, 1).shape[0])
        for end, which in zip(ends, (streams.clean, streams.corrupt), strict=True):
            end[streams.pair_ids] = _metric(streams, metric, which.before[-1], streams.rows).to(dtype)
        waves = [order[i : i + per_wave] for i in range(0, len(order), per_wave)]
        for wave in track(waves, "exact patching"):
            made = wave_of(streams, differences, graph, metric, [wanted[i] for i in wave]).to(dtype)
            for place, i in enumerate(wave):
                values[i, streams.pair_ids] = made[place] - ends[0][streams.pair_ids]
    return Effects(names=tuple(names), values=values, clean=ends[0], corrupt=ends[1])


def exact_scores(
    model: LoadedModel,
    pairs: PromptPairs,
    graph: Graph,
    metric: Metric,
    *,
    per_pair: bool = False,
    budget: int | None = None,
) -> EdgeScores:
    """Patch every edge of the graph: for small models."""
    found = exact_effects(model, pairs, graph, metric, graph.full(), budget=budget)
    where = graph.possible.nonzero(as_tuple=True)
    every = torch.zeros(len(pairs), *graph.possible.shape, dtype=found.values.dtype)
    every[:, where[0], where[1]] = found.values.T
    return EdgeScores(
        graph=graph, values=every.mean(0), method="exact", n_pairs=len(pairs), metric=metric.name,
        per_pair=every if per_pair else None,
    )  # fmt: skip


def _metric(streams: Streams, metric: Metric, stream: Tensor, rows: Tensor) -> Float[Tensor, " row"]:
    """The metric of streams that have left the last block."""
    found: list[Tensor] = []
    with torch.no_grad():
        for i in range(0, len(rows), LOGITS_PER_PASS):
            logits = streams.parts.head(stream[i : i + LOGITS_PER_PASS, -metric.n_last :])
            found.append(metric(logits, streams.pair_ids[rows[i : i + LOGITS_PER_PASS].cpu()]).cpu())
    return torch.cat(found)


def _wave(
    streams: Streams, differences: Differences, graph: Graph, metric: Metric, edges: Sequence[tuple[int, int]]
) -> Float[Tensor, "edge pair"]:
    """Metric with each edge patched; the edges are sorted by destination."""
    parts, n = streams.parts, len(streams)
    layers = [graph.destinations[column].layer % (parts.n_layers + 1) for _, column in edges]
    x, entered = streams.clean.before[0][:0], 0
    with torch.no_grad():
        for layer in range(layers[0], parts.n_layers):
            here = [edge for edge, at in zip(edges, layers, strict=True) if at == layer]
            first = [edge for edge in here if graph.destinations[edge[1]].kind in ("q", "k", "v")]
            rest = here[len(first) :]
            if entered or first:
                x = _attention(streams, differences, graph, layer, x, first)
                entered += len(first)
            if parts.has_mlp and (entered or rest):
                x = _mlp(streams, differences, graph, layer, x, rest)
                entered += len(rest)
        last = [row for (row, _), at in zip(edges, layers, strict=True) if at == parts.n_layers]
        if last:
            x = torch.cat([x, *(streams.clean.before[-1] + _difference(streams, differences, row) for row in last)])
    return _metric(streams, metric, x, streams.rows.repeat(len(edges))).view(len(edges), n)


def _node_wave(
    streams: Streams, differences: Differences, graph: Graph, metric: Metric, nodes: Sequence[tuple[int, int]]
) -> Float[Tensor, "node pair"]:
    """Metric with each source patched; the sources are in the order of the graph."""
    clean, rows = streams.clean, [row for row, _ in nodes]

    def entering(base: Tensor, kind: str, layer: int) -> list[Tensor]:
        there = [row for row in rows if graph.sources[row].kind == kind and graph.sources[row].layer == layer]
        return [base + _difference(streams, differences, row) for row in there]

    with torch.no_grad():
        x = torch.cat([clean.before[0][:0], *entering(clean.before[0], "embed", -1)])
        for layer in range(streams.parts.n_layers):
            x = _attention(streams, differences, graph, layer, x, []) if len(x) else x
            x = torch.cat([x, *entering(clean.mid[layer], "head", layer)])
            if streams.parts.has_mlp:
                x = _mlp(streams, differences, graph, layer, x, []) if len(x) else x
                x = torch.cat([x, *entering(clean.before[layer + 1], "mlp", layer)])
    return _metric(streams, metric, x, streams.rows.repeat(len(nodes))).view(len(nodes), -1)


def _difference(streams: Streams, differences: Differences, row: int) -> Float[Tensor, "pair pos d_model"]:
    layer = (row - 1) // streams.per_layer
    return differences(layer)[row - streams.source_rows(layer).start]


def _attention(
    streams: Streams, differences: Differences, graph: Graph, layer: int, x: Tensor, new: Sequence[tuple[int, int]]
) -> Float[Tensor, "row pos d_model"]:
    """Streams between attention and MLP: those that are under way, then one for each new edge and pair."""
    parts, clean = streams.parts, streams.clean
    read = parts.norm("attn", layer, x)
    given = {kind: [parts.project(kind, layer, read)] for kind in "qkv"}
    for row, column in new:
        kind, head = graph.destinations[column].kind, graph.destinations[column].head
        assert head is not None
        read = parts.norm("attn", layer, clean.before[layer] + _difference(streams, differences, row))
        for name, base in (("q", clean.q), ("k", clean.k), ("v", clean.v)):
            value = base[layer]
            if name == kind:
                value = value.clone()
                value[:, :, head] = parts.project(kind, layer, read[None], [head])[0]
            given[name].append(value)
    rows = streams.rows.repeat(len(new) + len(x) // len(streams))
    q, k, v = (torch.cat(given[kind]) for kind in "qkv")
    z = parts.attention(layer, q, k, v, rows)
    return torch.cat([x, clean.before[layer].repeat(len(new), 1, 1)]) + parts.write(layer, z)


def _mlp(
    streams: Streams, differences: Differences, graph: Graph, layer: int, x: Tensor, new: Sequence[tuple[int, int]]
) -> Float[Tensor, "row pos d_model"]:
    """Streams after the MLP: those that are under way, then one for each new edge and pair."""
    parts, mid = streams.parts, streams.clean.mid[layer]
    read = [parts.norm("mlp", layer, x)]
    read += [parts.norm("mlp", layer, mid + _difference(streams, differences, row)) for row, _ in new]
    streams_in = torch.cat([x, mid.repeat(len(new), 1, 1)])
    if not graph.split_mlp:
        return streams_in + parts.mlp(layer, torch.cat(read))
    plain = parts.norm("mlp", layer, mid)
    kinds = ["both", *(graph.destinations[column].kind for _, column in new)]
    gate = [plain if kind == "up" else value for kind, value in zip(kinds, read, strict=True)]
    up = [plain if kind == "gate" else value for kind, value in zip(kinds, read, strict=True)]
    return streams_in + parts.mlp_of_halves(layer, *parts.halves(layer, torch.cat(gate), torch.cat(up)))
