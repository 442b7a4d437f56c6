"""From scores of edges to a circuit: the best n, all above a threshold, or greedily from the logits upward.

top         the n edges of largest |score| (or, signed, those that speak most for the clean answer)
threshold   all edges with |score| >= t (signed: score <= -t)
greedy      begins at the logits and takes, n times, the best edge into a node that is already in (Hanna et al. 2024,
            https://arxiv.org/abs/2403.17806): every edge taken has a way to the logits
connected   without the edges that are on no way from the embedding to the logits. Under ablation with the corrupted
            run nothing changes by this, except after a norm that heads share (Gemma 2 and 3, OLMo 2)
"""

from __future__ import annotations

import heapq

import torch

from interp.circuits.graph import Circuit, EdgeScores
from interp.core.errors import InterpError


def connected(circuit: Circuit) -> Circuit:
    """Only the edges on a path from the embedding to the logits."""
    return circuit.connected()


def top(scores: EdgeScores, n: int, *, signed: bool = False) -> Circuit:
    """The best n edges, connected or not."""
    _check(scores, n)
    edges = torch.zeros_like(scores.graph.possible)
    chosen = scores.ranked(signed=signed)[:n]
    edges[chosen[:, 0], chosen[:, 1]] = True
    return Circuit(scores.graph, edges)


def threshold(scores: EdgeScores, least: float, *, signed: bool = False) -> Circuit:
    """Every edge that scores at least this."""
    if least < 0:
        raise InterpError(f"threshold {least} is negative; give the least magnitude")
    values = scores.values.cpu()
    kept = values <= -least if signed else values.abs() >= least
    return Circuit(scores.graph, kept & scores.graph.possible)


def greedy(scores: EdgeScores, n: int, *, signed: bool = False) -> Circuit:
    """The best n edges that hang together, from the logits upward."""
    _check(scores, n)
    graph, edges = scores.graph, torch.zeros_like(scores.graph.possible)
    rank = torch.full(graph.possible.shape, -1)
    order = scores.ranked(signed=signed)
    rank[order[:, 0], order[:, 1]] = torch.arange(len(order))
    heap: list[tuple[int, int, int]] = []
    seen: set[int] = set()

    def open_destination(column: int) -> None:
        if column not in seen:
            seen.add(column)
            for row in graph.possible[:, column].nonzero()[:, 0].tolist():
                heapq.heappush(heap, (int(rank[row, column]), row, column))

    for column, destination in enumerate(graph.destinations):
        if destination.kind == "logits":
            open_destination(column)
    for _ in range(n):
        if not heap:
            break
        _, row, column = heapq.heappop(heap)
        edges[row, column] = True
        for feeding in graph.feeds[:, row].nonzero()[:, 0].tolist():
            open_destination(feeding)
    return Circuit(graph, edges)


def _check(scores: EdgeScores, n: int) -> None:
    if not 0 <= n <= scores.graph.n_edges:
        raise InterpError(f"n={n} edges of a graph that has {scores.graph.n_edges}")
