"""The value an attribution graph is: nodes, edges, and what was left out.

Nodes in circuit-tracer's order: features, errors (layer-major), tokens, logits. `edges` has one row per node with
incoming edges (features, then logits) and one column per node that has outgoing ones (all but the logits):
    edges[t, s] = (what s writes) . d pre_t / d stream,     pre_t = sum_s edges[t, s] + bias_t + rest_t
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.errors import InterpError

NodeKind = Literal["feature", "error", "token", "logit"]


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node, for tables and figures."""

    kind: NodeKind
    layer: int
    """-1 for tokens, the number of layers for logits."""
    pos: int
    number: int
    """Of the feature or the token; -1 for errors."""

    @property
    def name(self) -> str:
        if self.kind == "feature":
            return f"f{self.layer}.{self.number}@{self.pos}"
        if self.kind == "error":
            return f"error{self.layer}@{self.pos}"
        return f"token@{self.pos}" if self.kind == "token" else f"logit:{self.number}"


@dataclass(frozen=True, kw_only=True, eq=False)
class AttributionGraph:
    """The linear effects between what a prompt activates."""

    tokens: Int[Tensor, " pos"]
    strings: tuple[str, ...]
    n_layers: int
    features: Int[Tensor, "feature 3"]
    """Layer, position, number; sorted."""
    values: Float[Tensor, " feature"]
    logit_tokens: Int[Tensor, " logit"]
    logit_strings: tuple[str, ...]
    logit_probabilities: Float[Tensor, " logit"]
    edges: Float[Tensor, "row column"]
    pre: Float[Tensor, " row"]
    """Measured: pre-activations of features, logits minus their mean."""
    bias: Float[Tensor, " row"]
    """What reaches each row from constants: biases, shifts, learned positions."""
    rest: Float[Tensor, " row"]
    """Sum of the edges from features that are no nodes, left out by the node budget."""
    rest_abs: Float[Tensor, " row"]
    """Sum of their sizes."""
    n_active: int
    """Active features before the node budget."""

    def __post_init__(self) -> None:
        if self.edges.shape != (self.n_features + self.n_logits, self.n_features + self.n_errors + self.n_pos):
            raise InterpError(
                f"edges of shape {tuple(self.edges.shape)} do not fit {self.n_features} features, {self.n_errors} "
                f"errors, {self.n_pos} tokens and {self.n_logits} logits"
            )

    @property
    def n_features(self) -> int:
        return len(self.features)

    @property
    def n_pos(self) -> int:
        return len(self.tokens)

    @property
    def n_errors(self) -> int:
        return self.n_layers * self.n_pos

    @property
    def n_logits(self) -> int:
        return len(self.logit_tokens)

    @property
    def n_nodes(self) -> int:
        return self.n_features + self.n_errors + self.n_pos + self.n_logits

    @property
    def errors(self) -> slice:
        """Columns of the errors."""
        return slice(self.n_features, self.n_features + self.n_errors)

    @property
    def token_columns(self) -> slice:
        return slice(self.n_features + self.n_errors, self.n_features + self.n_errors + self.n_pos)

    def kinds(self) -> list[NodeKind]:
        """What each node is."""
        sizes: tuple[tuple[NodeKind, int], ...] = (
            ("feature", self.n_features), ("error", self.n_errors), ("token", self.n_pos), ("logit", self.n_logits),
        )  # fmt: skip
        return [kind for kind, size in sizes for _ in range(size)]

    def node(self, index: int) -> Node:
        """A node by its number in circuit-tracer's order."""
        if not 0 <= index < self.n_nodes:
            raise InterpError(f"no node {index}: the graph has nodes 0 to {self.n_nodes - 1}")
        if index < self.n_features:
            layer, pos, number = self.features[index].tolist()
            return Node(kind="feature", layer=layer, pos=pos, number=number)
        index -= self.n_features
        if index < self.n_errors:
            return Node(kind="error", layer=index // self.n_pos, pos=index % self.n_pos, number=-1)
        index -= self.n_errors
        if index < self.n_pos:
            return Node(kind="token", layer=-1, pos=index, number=int(self.tokens[index]))
        number = int(self.logit_tokens[index - self.n_pos])
        return Node(kind="logit", layer=self.n_layers, pos=self.n_pos - 1, number=number)

    def row_of(self, node: int) -> int | None:
        """The row of a node; None for errors and tokens, which have no incoming edges."""
        if node < self.n_features:
            return node
        first = self.n_nodes - self.n_logits
        return self.n_features + node - first if node >= first else None

    def levels(self) -> Int[Tensor, " row"]:
        """Layer of each row's node, the number of layers for logits: edges only run upwards."""
        top = torch.full((self.n_logits,), self.n_layers, dtype=torch.long)
        return torch.cat([self.features[:, 0].long(), top])

    def weights(self) -> Float[Tensor, " row"]:
        """Probabilities on logit rows, 0 elsewhere."""
        return torch.cat([self.edges.new_zeros(self.n_features), self.logit_probabilities.to(self.edges.dtype)])

    def accounting(self) -> Float[Tensor, " row"]:
        """|sum of edges + bias + rest - pre| relative to the sum of their sizes: 0 up to rounding."""
        sums, sizes = self.edges.sum(1), self.edges.abs().sum(1)
        gap = (sums + self.bias + self.rest - self.pre).abs()
        return gap / (sizes + self.rest_abs + self.bias.abs()).clamp_min(1e-12)

    def adjacency(self) -> Float[Tensor, "node node"]:
        """The square matrix, rows are targets: n_nodes^2 numbers."""
        full = self.edges.new_zeros(self.n_nodes, self.n_nodes)
        n_columns = self.edges.shape[1]
        full[: self.n_features, :n_columns] = self.edges[: self.n_features]
        full[n_columns:, :n_columns] = self.edges[self.n_features :]
        return full
