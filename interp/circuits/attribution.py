"""Scores of all edges of a transformer, from a few forward and backward passes.

    score(u -> v) = mean over pairs of  sum over positions of  (z_u,corrupt - z_u,clean) . g_v
estimates by how much the metric changes when v alone receives u's output of the corrupted run. z_u is what source u
adds to the stream; g_v is the metric's gradient at what v reads, before v's norm, taken
    eap                  at the clean run (Syed et al. 2023, https://arxiv.org/abs/2310.10348)
    clean-corrupt        the mean of the gradients at the two runs
    eap-ig               the mean over runs whose embeddings lie between, at (k + 1/2) / steps of the way (Hanna et al.
                         2024, https://arxiv.org/abs/2403.17806, who take a left sum; midpoints err less)
    eap-ig-activations   for the edges of each u, the mean over runs in which the outputs of u's sublayer alone lie
                         between; `steps` times the number of sublayers backward passes
    exact                no estimate: each edge is patched (`interp.circuits.exact`); hours for a real model
Negative scores speak for the clean answer. In a linear model all are equal and exact, and the scores into the logits
add up to M(corrupt) - M(clean). Beware: gradients miss what saturates; the KL has none at its reference, so `eap` gives
zeros there. Memory: pairs go in batches, and sources layer by layer where their differences do not fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from interp.circuits.gradients import Gradient, gradients
from interp.circuits.graph import EdgeScores, Graph
from interp.circuits.streams import Differences, Streams, batches, budget_of, check_graph, stream_bytes
from interp.circuits.sublayers import Where
from interp.core.errors import InterpError, unknown
from interp.core.progress import track
from interp.models.model import LoadedModel
from interp.tasks.base import PromptPairs
from interp.tasks.metrics import Metric

METHODS = ("eap", "clean-corrupt", "eap-ig", "eap-ig-activations", "exact")
PART_NUMBERS = 1 << 24
"""Parts by pair and position that are held at once, at most."""


@dataclass(frozen=True, kw_only=True)
class _Totals:
    """Sums over pairs and positions as they come in; what was not asked for is None."""

    values: Float[Tensor, "source destination"]
    per_pair: Float[Tensor, "pair source destination"] | None
    per_position: Float[Tensor, "pos source destination"] | None


def edge_scores(
    model: LoadedModel,
    pairs: PromptPairs,
    graph: Graph,
    metric: Metric,
    method: str = "eap",
    *,
    steps: int = 5,
    per_pair: bool = False,
    per_position: bool = False,
    budget: int | None = None,
) -> EdgeScores:
    """Score every edge. `per_pair`, `per_position`: keep these parts as well; `budget`: bytes to plan with."""
    if method not in METHODS:
        raise unknown("edge method", method, METHODS)
    if steps < 1:
        raise InterpError(f"steps={steps} must be at least 1")
    if method == "exact":
        from interp.circuits.exact import exact_scores

        if per_position:
            raise InterpError("exact patching replaces an edge at all positions; per_position is for estimates")
        return exact_scores(model, pairs, graph, metric, per_pair=per_pair, budget=budget)
    limit = budget_of(budget)
    shape, dtype = graph.possible.shape, torch.promote_types(model.dtype, torch.float32)
    totals = _Totals(
        values=torch.zeros(shape, dtype=torch.float64),
        per_pair=torch.zeros(len(pairs), *shape, dtype=dtype) if per_pair else None,
        per_position=torch.zeros(pairs.n_pos, *shape, dtype=dtype) if per_position else None,
    )
    per = _bytes_per_pair(model, pairs, graph)
    for batch in batches(pairs, per, limit):
        streams = Streams.of(model, pairs.take(batch), n_last=metric.n_last, first=batch.start)
        check_graph(streams, graph)
        differences = Differences(streams, limit)
        at_once = max(1, limit // (per * len(streams)))
        if method == "eap-ig-activations":
            _add_activations(totals, streams, graph, metric, differences, steps, at_once)
        else:
            _add_inputs(totals, streams, graph, metric, differences, points_of(method, steps), at_once)
    values = torch.where(graph.possible, (totals.values / len(pairs)).to(dtype), 0.0)
    if totals.per_position is not None:
        totals.per_position.div_(len(pairs)).mul_(graph.possible)
    if totals.per_pair is not None:
        totals.per_pair.mul_(graph.possible)
    return EdgeScores(
        graph=graph, values=values, method=method if "ig" not in method else f"{method} ({steps} steps)",
        n_pairs=len(pairs), metric=metric.name, per_pair=totals.per_pair, per_position=totals.per_position,
    )  # fmt: skip


def node_scores(scores: EdgeScores) -> Float[Tensor, " source"]:
    """What patching each source whole would do, as far as its edges tell: the sum over its edges out.

    For scores from gradients this is attribution patching of the source, since the gradient at its output is the sum of
    those at its readers.
    """
    return (scores.values * scores.graph.possible).sum(1)


def points_of(method: str, steps: int) -> list[float]:
    """Where on the way from the clean to the corrupted run gradients are taken."""
    fixed = {"eap": [0.0], "clean-corrupt": [0.0, 1.0]}
    return fixed.get(method) or [(k + 0.5) / steps for k in range(steps)]


def between(clean: Tensor, corrupt: Tensor, points: list[float]) -> Float[Tensor, "row pos d_model"]:
    """Streams at these points of the way, one after the other."""
    return torch.cat([torch.lerp(clean, corrupt, point) for point in points])


def _chunks(points: list[float], at_once: int) -> Iterator[list[float]]:
    return (points[i : i + at_once] for i in range(0, len(points), at_once))


def _add_inputs(
    totals: _Totals, streams: Streams, graph: Graph, metric: Metric, differences: Differences,
    points: list[float], at_once: int,
) -> None:  # fmt: skip
    """Gradients at runs between the embeddings of the two."""
    for chunk in track(list(_chunks(points, at_once)), "edge attribution"):
        x = between(streams.clean.before[0], streams.corrupt.before[0], chunk)
        for gradient in _gradients(streams, graph, metric, x, len(chunk), 0, "attn"):
            values = _mean_of_points(gradient, len(chunk)) * (len(chunk) / len(points))
            for rows, difference in differences.before(gradient.layer, mid=gradient.mid):
                _add(totals, streams, rows, gradient.columns, difference, values)


def _add_activations(
    totals: _Totals, streams: Streams, graph: Graph, metric: Metric, differences: Differences, steps: int, at_once: int
) -> None:
    """Gradients at runs in which the outputs of one sublayer lie between those of the two."""
    points, parts, clean, corrupt = points_of("", steps), streams.parts, streams.clean, streams.corrupt
    sublayers: list[tuple[int, Where]] = [(-1, "mlp")]
    for layer in range(parts.n_layers):
        sublayers.append((layer, "attn"))
        if parts.has_mlp:
            sublayers.append((layer, "mlp"))
    for layer, where in track(sublayers, "edge attribution"):
        rows, n_heads = streams.source_rows(layer), parts.n_heads
        difference = differences(layer)
        start: tuple[int, Where] = (layer, "mlp")
        if layer < 0:
            ends = clean.before[0], corrupt.before[0]
            start = (0, "attn")
        elif where == "attn":
            ends = (
                clean.mid[layer],
                clean.mid[layer]
                + (corrupt.mid[layer] - corrupt.before[layer] - clean.mid[layer] + clean.before[layer]),
            )
            rows, difference = slice(rows.start, rows.start + n_heads), difference[:n_heads]
            start = start if parts.has_mlp else (layer + 1, "attn")
        else:
            rows, difference = slice(rows.stop - 1, rows.stop), difference[n_heads:]
            ends = clean.before[layer + 1], clean.before[layer + 1] + difference[0]
            start = (layer + 1, "attn")
        for chunk in _chunks(points, at_once):
            x = between(*ends, chunk)
            for gradient in _gradients(streams, graph, metric, x, len(chunk), start[0], start[1]):
                values = _mean_of_points(gradient, len(chunk)) * (len(chunk) / steps)
                _add(totals, streams, rows, gradient.columns, difference, values)


def _gradients(
    streams: Streams, graph: Graph, metric: Metric, x: Tensor, n_points: int, layer: int, where: Where
) -> Iterator[Gradient]:
    return gradients(
        streams.parts, graph, x, streams.rows.repeat(n_points), metric, streams.pair_ids.repeat(n_points),
        layer=layer, where=where,
    )  # fmt: skip


def _mean_of_points(gradient: Gradient, n_points: int) -> Float[Tensor, "destination pair pos d_model"]:
    return gradient.values.unflatten(1, (n_points, -1)).mean(1)


def _add(totals: _Totals, streams: Streams, rows: slice, columns: slice, difference: Tensor, gradient: Tensor) -> None:
    """Inner products of the differences and gradients, both (source or destination, pair, pos, d_model)."""
    wide = torch.promote_types(difference.dtype, torch.float32)
    difference, gradient = difference.to(wide), gradient.to(wide)
    if totals.per_pair is None and totals.per_position is None:
        totals.values[rows, columns] += (difference.flatten(1) @ gradient.flatten(1).mT).cpu()
        return
    right = gradient.flatten(1, 2).transpose(0, 1).mT
    n = max(1, PART_NUMBERS // (right.shape[0] * right.shape[2]))
    for i in range(0, len(difference), n):
        some = slice(rows.start + i, min(rows.start + i + n, rows.stop))
        left = difference[i : i + n].flatten(1, 2).transpose(0, 1)
        parts = torch.bmm(left, right).unflatten(0, difference.shape[1:3])
        totals.values[some, columns] += parts.sum((0, 1)).cpu()
        if totals.per_pair is not None:
            totals.per_pair[streams.pair_ids, some, columns] += parts.sum(1).cpu()
        if totals.per_position is not None:
            totals.per_position[streams.parts.start :, some, columns] += parts.sum(0).cpu()


def _bytes_per_pair(model: LoadedModel, pairs: PromptPairs, graph: Graph) -> int:
    """What one pair takes: the streams of two runs, and the graph of one backward pass."""
    d_mlp = model.dims.d_mlp or 0
    width = model.dims.d_model or 1
    return int(stream_bytes(model, pairs) * graph.n_layers * (24 + 5 * d_mlp / width))
