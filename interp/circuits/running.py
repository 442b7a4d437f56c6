"""Running a model with only a circuit, several circuits at once.

    input_v = reference_v + sum over edges u->v in C of (z_u - r_u)
Each destination v reads the current output z_u of the sources that the circuit connects it to, and of all others a
reference r_u: the corrupted run's output ("corrupt", default), 0 ("zero"), or the mean over the corrupted prompts at
each position ("mean"). With all edges the logits are those of the clean prompts, with none those of the corrupted ones.
Output biases of attention belong to no source and stay; an MLP's are part of it.

Only sources that changed are added up: a head whose inputs are those of the corrupted run is not computed at all, and
several circuits go through the blocks together as rows. Memory: one stream for each active source, circuit and pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from interp.circuits.deltas import Deltas
from interp.circuits.graph import Circuit, Graph
from interp.circuits.streams import Run, Streams, check_graph
from interp.core.errors import InterpError, unknown
from interp.models.model import LoadedModel
from interp.tasks.base import PromptPairs
from interp.tasks.metrics import Metric

ABLATIONS = ("corrupt", "zero", "mean")
AT_ONCE = 16
"""Circuits that go through the blocks together, at most."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Reference:
    """What destinations read when the circuit is empty, and what sources are compared with."""

    run: Run
    """Streams, with the references of the sources in place of their outputs."""
    written: list[Tensor] | None = None
    """Reference outputs (source, 1 or pair, 1 or pos, d_model or 1), embedding first; None: those of the run."""


@dataclass(frozen=True, eq=False)
class Given:
    """What sources below a layer add, where circuits do not differ there."""

    layer: int
    deltas: Float[Tensor, "source pair pos d_model"]


class Evaluator:
    """Some pairs, ready to be run with any circuit of a graph: the two runs are made once."""

    def __init__(
        self,
        model: LoadedModel,
        pairs: PromptPairs,
        graph: Graph,
        *,
        ablation: str = "corrupt",
        n_last: int = 1,
        first: int = 0,
    ) -> None:
        """`n_last`: how many positions of logits, from the end, can be asked for; `first`: number of the first pair for
        the caller's metric."""
        if ablation not in ABLATIONS:
            raise unknown("ablation", ablation, ABLATIONS)
        start = None if ablation == "corrupt" else 0
        self.streams = Streams.of(model, pairs, n_last=n_last, start=start, first=first)
        check_graph(self.streams, graph)
        self.graph, self.ablation, self.pair_ids = graph, ablation, self.streams.pair_ids
        self._reference = _reference(self.streams, ablation)
        self._exact_paths = ablation == "corrupt" and not self.streams.parts.normed_after
        """Whether a source without inputs in the circuit is exactly its reference."""

    def logits(
        self, circuits: Sequence[Circuit], n_last: int = 1, given: Given | None = None
    ) -> Float[Tensor, "circuit pair last vocab"]:
        """Logits of the last positions with each circuit, all circuits as rows of one pass. `given`: see `upstream`."""
        for circuit in circuits:
            if circuit.graph is not self.graph and not circuit.graph.same(self.graph):
                raise InterpError(f"{circuit} is of another graph than {self.graph}")
        if n_last > (held := self.streams.clean.before[0].shape[1]):
            raise InterpError(f"logits of {n_last} positions, {held} were run; make the Evaluator with n_last={n_last}")
        trim = given is None and self._exact_paths
        kept = [circuit.connected() if trim else circuit for circuit in circuits]
        with torch.no_grad():
            deltas = self._begin(torch.stack([circuit.edges for circuit in kept]), given)
            stream = self._through(deltas, 0 if given is None else given.layer)[:, :, -n_last:]
            return self.streams.parts.head(stream.flatten(0, 1)).unflatten(0, stream.shape[:2])

    def values(
        self, circuits: Sequence[Circuit], metric: Metric, given: Given | None = None
    ) -> Float[Tensor, "circuit pair"]:
        """The metric of each circuit and pair."""
        logits = self.logits(circuits, metric.n_last, given).flatten(0, 1)
        return metric(logits, self.pair_ids.repeat(len(circuits))).view(len(circuits), -1)

    def ends(self, metric: Metric) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]:
        """The metric with all edges and with none."""
        with torch.no_grad():
            runs = (self.streams.clean, self._reference.run)
            both = [self.streams.parts.head(which.before[-1][:, -metric.n_last :]) for which in runs]
            return metric(both[0], self.pair_ids), metric(both[1], self.pair_ids)

    def circuits_at_once(self, budget: int) -> int:
        """How many circuits fit."""
        return max(1, min(AT_ONCE, budget // (2 * self.streams.difference_bytes)))

    def upstream(self, circuit: Circuit) -> Float[Tensor, "source pair pos d_model"]:
        """What every source adds beyond its reference when the model runs with this circuit. Circuits that agree with
        it below a layer can be run from there on: `Given(layer, these)`."""
        with torch.no_grad():
            deltas = self._begin(circuit.edges[None], None, keep=True)
            self._through(deltas, 0)
            return deltas.finished()[0]

    def _begin(self, edges: Tensor, given: Given | None, *, keep: bool = False) -> Deltas:
        """With what the embedding adds, or with what is given."""
        first = self.streams.clean.before[0]
        if given is not None:
            shared = given.deltas[: self.streams.source_rows(given.layer).start]
            return Deltas.of(edges.to(first.device), first, shared)
        deltas = Deltas.of(edges.to(first.device), first, keep=keep)
        if deltas.wants(0):
            deltas.add(0, (first - self._written(-1)[0]).expand(len(edges), *first.shape))
        return deltas

    def _through(self, deltas: Deltas, layer: int) -> Float[Tensor, "circuit pair pos d_model"]:
        """Streams that the logits read, from a layer on."""
        streams = self.streams
        column = streams.parts.n_heads + 2 * streams.parts.n_kv + streams.parts.has_mlp * (1 + self.graph.split_mlp)
        column *= layer
        for number in range(layer, streams.parts.n_layers):
            column = self._attention(number, column, deltas)
            column = self._mlp(number, column, deltas) if streams.parts.has_mlp else column
        columns, added = deltas.added([column])
        base = self._reference.run.before[-1].expand(len(deltas.edges), *deltas.shape)
        return base + added[0] if columns else base

    def _written(self, layer: int) -> Float[Tensor, "source pairs positions width"]:
        """Reference outputs of a layer's sources; axes of size 1 where all are alike."""
        kept = self._reference.written
        return self.streams.written(self._reference.run, layer) if kept is None else kept[layer + 1]

    def _attention(self, layer: int, column: int, deltas: Deltas) -> int:
        """Run the heads whose inputs changed; returns the column after the layer's queries, keys and values."""
        parts, base, n_circuits = self.streams.parts, self._reference.run, len(deltas.edges)
        ends = [column, column + parts.n_heads, column + parts.n_heads + parts.n_kv]
        after, row = ends[2] + parts.n_kv, self.streams.source_rows(layer).start
        columns, added = deltas.added(range(column, after))
        fed = self.graph.feeds[columns].any(0)
        every = self.ablation != "corrupt" or (bool(columns) and parts.normed_after)
        heads = [i for i in range(parts.n_heads) if deltas.wants(row + i) and (every or bool(fed[row + i]))]
        if not heads:
            return after
        read = parts.norm("attn", layer, base.before[layer] + added).flatten(1, 2)
        given: dict[str, Tensor] = {}
        for kind, start, stop in zip("qkv", ends, (*ends[1:], after), strict=True):
            plain: Tensor = getattr(base, kind)[layer]
            given[kind] = plain.repeat(n_circuits, 1, 1, 1)
            chosen = [i for i, number in enumerate(columns) if start <= number < stop]
            if chosen:
                own = [columns[i] - start for i in chosen]
                given[kind][:, :, own] = parts.project(kind, layer, read[chosen], own).movedim(0, 2)
        z = parts.attention(layer, given["q"], given["k"], given["v"], self.streams.rows.repeat(n_circuits))
        for head, delta in zip(heads, self._beyond(layer, z, heads), strict=True):
            deltas.add(row + head, delta)
        return after

    def _beyond(self, layer: int, z: Tensor, heads: list[int]) -> Float[Tensor, "chosen circuit pair pos d_model"]:
        """What heads add beyond their reference."""
        parts, shape = self.streams.parts, (-1, len(self.streams))
        if self._exact_paths:  # linear in z: one product instead of two
            plain = self._reference.run.z[layer]
            difference = z.unflatten(0, shape) - plain
            return parts.results(layer, difference.flatten(0, 1), heads).unflatten(1, shape)
        return parts.results(layer, z, heads).unflatten(1, shape) - self._written(layer)[heads][:, None]

    def _mlp(self, layer: int, column: int, deltas: Deltas) -> int:
        """Run the MLP of a layer if its input changed; returns the column after it."""
        parts, mid, n = self.streams.parts, self._reference.run.mid[layer], 1 + self.graph.split_mlp
        row = self.streams.source_rows(layer).stop - 1
        columns, added = deltas.added(range(column, column + n))
        if not deltas.wants(row) or (not columns and self.ablation == "corrupt"):
            return column + n
        read = [mid.repeat(len(deltas.edges), 1, 1)] * n
        for number, stream in zip(columns, added, strict=True):
            read[number - column] = (mid + stream).flatten(0, 1)
        normed = [parts.norm("mlp", layer, stream) for stream in read]
        if self.graph.split_mlp:
            made = parts.mlp_of_halves(layer, *parts.halves(layer, normed[0], normed[1]))
        else:
            made = parts.mlp(layer, normed[0])
        deltas.add(row, made.unflatten(0, (len(deltas.edges), -1)) - self._written_mlp(layer))
        return column + n

    def _written_mlp(self, layer: int) -> Tensor:
        kept = self._reference.written
        run = self._reference.run
        return run.before[layer + 1] - run.mid[layer] if kept is None else kept[layer + 1][-1]


def _reference(streams: Streams, ablation: str) -> _Reference:
    if ablation == "corrupt":
        return _Reference(run=streams.corrupt)
    parts, made = streams.parts, Run(before=[], mid=[], q=[], k=[], v=[], z=[])
    written: list[Tensor] = []
    for layer in range(-1, parts.n_layers):
        values = streams.written(streams.corrupt, layer)
        written.append(values.mean(1, keepdim=True) if ablation == "mean" else values.new_zeros(len(values), 1, 1, 1))
    x = streams.clean.before[0] * 0 + written[0][0]
    with torch.no_grad():
        for layer in range(parts.n_layers):
            read = parts.norm("attn", layer, x)
            for kind, kept in (("q", made.q), ("k", made.k), ("v", made.v)):
                kept.append(parts.project(kind, layer, read))
            made.before.append(x)
            bias = parts.model.table.bias("W_O", layer)
            x = x + written[layer + 1][: parts.n_heads].sum(0) + (0 if bias is None else bias)
            made.mid.append(x)
            x = x + written[layer + 1][-1] if parts.has_mlp else x
    made.before.append(x)
    return _Reference(run=made, written=written)
