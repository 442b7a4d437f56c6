"""Gradients of a metric at what every destination reads, from one forward that can begin at any layer.

The metric's gradient at queries, keys, values and MLP inputs comes from autograd through the model's own modules; each
head's is taken back through its projection and then through the norm before it, at the stream it was computed from:
    g_v = J_norm(x)^T W_v^T dM/d(projection)         (for each destination v, at its own positions)
so that changing v's input alone by a small d changes the metric by g_v . d. Paths around v do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.circuits.graph import Graph
from interp.circuits.sublayers import Sublayers, Where
from interp.instrument.guards import frozen
from interp.tasks.metrics import Metric


@dataclass(frozen=True, kw_only=True, eq=False)
class Read:
    """What one sublayer (or the logits) read from the stream, in the graph."""

    layer: int
    """The number of layers for the logits."""
    where: Where
    stream: Float[Tensor, "row pos d_model"]
    """Before the norm; outside the graph."""
    tensors: tuple[Tensor, ...]
    """Queries, keys, values; the normed input of the MLP, or its halves; the normed input of the logits."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Gradient:
    """Gradients at the destinations of one sublayer, or of the logits."""

    layer: int
    mid: bool
    """Whether heads of this layer come before."""
    columns: slice
    """Of the graph."""
    values: Float[Tensor, "destination row pos d_model"]


def gradients(
    parts: Sublayers,
    graph: Graph,
    stream: Float[Tensor, "row pos d_model"],
    rows: Int[Tensor, " row"],
    metric: Metric,
    pair_ids: Int[Tensor, " row"],
    *,
    layer: int = 0,
    where: Where = "attn",
) -> Iterator[Gradient]:
    """Gradients at every destination from a sublayer on, for streams that enter it; the last destinations first.

    `rows` are the prompts of the recorded run that the rows belong to, `pair_ids` what the metric knows them by.
    """
    with frozen(parts.model.module), torch.enable_grad():
        reads, total = _forward(parts, graph, stream.detach().requires_grad_(), rows, metric, pair_ids, layer, where)
        wanted = [tensor for read in reads for tensor in read.tensors]
        found = iter(torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True))
    by_read = [(read, [next(found) for _ in read.tensors]) for read in reads]
    del found, wanted, total
    while by_read:
        read, grads = by_read.pop()
        yield _gradient(parts, graph, read, grads)


def _forward(
    parts: Sublayers, graph: Graph, x: Tensor, rows: Tensor, metric: Metric, pair_ids: Tensor, first: int, where: Where
) -> tuple[list[Read], Tensor]:
    reads: list[Read] = []
    for layer in range(first, parts.n_layers):
        if layer > first or where == "attn":
            normed = parts.norm("attn", layer, x)
            q, k, v = (parts.project(kind, layer, normed) for kind in "qkv")
            reads.append(Read(layer=layer, where="attn", stream=x.detach(), tensors=(q, k, v)))
            x = x + parts.write(layer, parts.attention(layer, q, k, v, rows))
        if not parts.has_mlp:
            continue
        normed = _apart(parts.norm("mlp", layer, x), x)
        if graph.split_mlp:
            halves = parts.halves(layer, normed, normed)
            reads.append(Read(layer=layer, where="mlp", stream=x.detach(), tensors=halves))
            x = x + parts.mlp_of_halves(layer, *halves)
        else:
            reads.append(Read(layer=layer, where="mlp", stream=x.detach(), tensors=(normed,)))
            x = x + parts.mlp(layer, normed)
    normed = _apart(parts.final(x), x)
    reads.append(Read(layer=parts.n_layers, where="attn", stream=x.detach(), tensors=(normed,)))
    return reads, metric(parts.unembed(normed[:, -metric.n_last :]), pair_ids).sum()


def _apart(normed: Tensor, x: Tensor) -> Tensor:
    """Where there is no norm, a tensor of its own, so that its gradient is not that of the whole stream."""
    return x.view_as(x) if normed is x else normed


@torch.no_grad()
def _gradient(parts: Sublayers, graph: Graph, read: Read, grads: list[Tensor]) -> Gradient:
    layer, n_read = read.layer, parts.n_heads + 2 * parts.n_kv
    per_layer = n_read + (1 + graph.split_mlp if parts.has_mlp else 0)
    first = layer * per_layer
    if layer == parts.n_layers:
        values = back_through(parts.final, read.stream, grads[0][None])
        return Gradient(layer=layer, mid=False, columns=slice(first, first + 1), values=values)
    if read.where == "attn":
        back = torch.cat([parts.back(kind, layer, grad) for kind, grad in zip("qkv", grads, strict=True)])
        columns = slice(first, first + n_read)
    else:
        names = ("W_gate", "W_up")
        back = (
            torch.stack([grad @ parts.model.weight(name, layer).mT for name, grad in zip(names, grads, strict=True)])
            if graph.split_mlp
            else grads[0][None]
        )
        columns = slice(first + n_read, first + per_layer)

    def norm(stream: Tensor) -> Tensor:
        return parts.norm(read.where, layer, stream)

    return Gradient(layer=layer, mid=read.where == "mlp", columns=columns, values=back_through(norm, read.stream, back))


def back_through(
    norm: Callable[[Tensor], Tensor],
    stream: Float[Tensor, "row pos d_model"],
    grad: Float[Tensor, "destination row pos d_model"],
) -> Float[Tensor, "destination row pos d_model"]:
    """Gradients at the stream from gradients at the normed stream."""
    with torch.enable_grad():
        x = stream.detach().expand(grad.shape).requires_grad_()
        y = norm(x)
        return grad if y is x else torch.autograd.grad(y, x, grad)[0].detach()
