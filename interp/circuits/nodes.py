"""Names of the ends of edges: sources that write to the residual stream, destinations that read it.

Sources are `embed`, `a3.h1` (layer 3, head 1) and `m5`; destinations `a3.h1.q`, `a3.g0.k`, `a3.g0.v` (of a kv group),
`m5` (or its halves `m5.gate`, `m5.up`) and `logits`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast

from jaxtyping import Bool
from torch import Tensor

from interp.core.errors import InterpError

SourceKind = Literal["embed", "head", "mlp"]
DestinationKind = Literal["q", "k", "v", "mlp", "gate", "up", "logits"]
_NAME = re.compile(r"embed|logits|a(\d+)\.([hg])(\d+)(?:\.([qkv]))?|m(\d+)(?:\.(gate|up))?")


@dataclass(frozen=True)
class Source:
    """What adds to the stream. `layer` is -1 for the embedding; `head` is None but for heads."""

    kind: SourceKind
    layer: int = -1
    head: int | None = None

    def __str__(self) -> str:
        return {"embed": "embed", "head": f"a{self.layer}.h{self.head}", "mlp": f"m{self.layer}"}[self.kind]

    @property
    def when(self) -> int:
        """Time at which it is written: two steps a layer."""
        return -1 if self.kind == "embed" else 2 * self.layer + (self.kind == "mlp")


@dataclass(frozen=True)
class Destination:
    """What reads the stream. `head` is a head for `q`, a kv group for `k` and `v`; `layer` of the logits is -1."""

    kind: DestinationKind
    layer: int = -1
    head: int | None = None

    def __str__(self) -> str:
        if self.kind == "logits":
            return "logits"
        if self.kind in ("q", "k", "v"):
            return f"a{self.layer}.{'h' if self.kind == 'q' else 'g'}{self.head}.{self.kind}"
        return f"m{self.layer}" + ("" if self.kind == "mlp" else f".{self.kind}")

    @property
    def node(self) -> str:
        """The node it belongs to, with a kv group as a node of its own: `a3.h1`, `a3.g0`, `m5`, `logits`."""
        return str(self).rpartition(".")[0] if self.kind in ("q", "k", "v", "gate", "up") else str(self)


def source_of(name: str) -> Source:
    """`a3.h1` as a value."""
    found = _NAME.fullmatch(name)
    if name == "embed":
        return Source("embed")
    if found and found[5] is not None and found[6] is None:
        return Source("mlp", int(found[5]))
    if found and found[1] is not None and found[2] == "h" and found[4] is None:
        return Source("head", int(found[1]), int(found[3]))
    raise InterpError(f"{name!r} is no source; these are embed, a3.h1 (layer 3, head 1) and m5")


def destination_of(name: str) -> Destination:
    """`a3.g0.k` as a value."""
    found = _NAME.fullmatch(name)
    if name == "logits":
        return Destination("logits")
    if found and found[5] is not None:
        return Destination(cast("DestinationKind", found[6] or "mlp"), int(found[5]))
    if found and found[4] is not None and (found[2] == "h") == (found[4] == "q"):
        return Destination(cast("DestinationKind", found[4]), int(found[1]), int(found[3]))
    raise InterpError(f"{name!r} is no destination; these are a3.h1.q, a3.g0.k, a3.g0.v, m5, m5.gate, m5.up and logits")


def read_at(destination: Destination, last: int) -> int:
    if destination.kind == "logits":
        return last + 1
    return 2 * destination.layer + (destination.kind not in ("q", "k", "v"))


def fed(destination: Destination, group_size: int) -> list[str]:
    """Names of the sources a destination is an input of."""
    if destination.kind == "logits":
        return []
    if destination.kind in ("k", "v"):
        first = (destination.head or 0) * group_size
        return [f"a{destination.layer}.h{head}" for head in range(first, first + group_size)]
    return [destination.node]


def reached(
    edges: Bool[Tensor, "source destination"],
    feeds: Bool[Tensor, "destination source"],
    starts: Bool[Tensor, " source"],
    ends: Bool[Tensor, " destination"],
) -> tuple[Bool[Tensor, " source"], Bool[Tensor, " destination"]]:
    """Sources that something from `starts` reaches, and destinations from which something reaches `ends`."""
    starts, ends = starts.clone(), ends.clone()
    for i in range(len(starts)):
        starts[i] |= (edges[:, feeds[:, i]] & starts[:, None]).any()
    for i in reversed(range(len(starts))):
        if bool((edges[i] & ends).any()):
            ends |= feeds[:, i]
    return starts, ends
