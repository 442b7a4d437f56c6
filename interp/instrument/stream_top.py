"""Top-activating examples: at which tokens is each coordinate of a site largest?

For each coordinate the `n` tokens with the largest values, largest first, each with the ids around it. Exact: the same
as sorting everything, by value, then row, then position; memory is that of n examples per coordinate. Per batch, values
and token order are packed into one 64-bit key (an order-preserving image of float32 above, the order below), so that
ties fall the same way however the input is cut and whoever runs it.
Trap: float64 is compared as float32. A coordinate is looked at on its positive side only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.errors import InterpError
from interp.instrument.stream import Batch
from interp.instrument.stream_observers import by_site, flattened, in_order
from interp.instrument.stream_rows import Rows

CHUNK_NUMBERS = 1 << 22
"""Values handled at once: their keys need 8 bytes each."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """The top tokens of each coordinate of one site, largest first."""

    dims: Int[Tensor, " d"]
    """Which coordinates, of the flattened activation."""
    value: Float[Tensor, "n d"]
    """-inf where fewer than n tokens were seen; row, pos and id are -1 there."""
    row: Int[Tensor, "n d"]
    pos: Int[Tensor, "n d"]
    id: Int[Tensor, "n d"]
    """Token id, -1 where the input is no text."""
    context: Int[Tensor, "n d width"]
    """Ids before, at and after the token; -1 beyond the sequence."""

    def table(self, dim: int) -> pd.DataFrame:
        """The examples of one coordinate: rank, value, row, pos, id, context."""
        where = (self.dims == dim).nonzero()
        if not len(where):
            raise InterpError(f"coordinate {dim} was not watched; watched are {_few(self.dims)}")
        at = int(where[0])
        rows: list[dict[str, Any]] = [
            {
                "rank": i + 1,
                "value": float(self.value[i, at]),
                "row": int(self.row[i, at]),
                "pos": int(self.pos[i, at]),
                "id": int(self.id[i, at]),
                "context": [token for token in self.context[i, at].tolist() if token >= 0],
            }
            for i in range(len(self.value))
            if int(self.row[i, at]) >= 0
        ]
        return pd.DataFrame(rows, columns=["rank", "value", "row", "pos", "id", "context"])

    def merge(self, other: Examples) -> Examples:
        """The best of both."""
        if not torch.equal(self.dims, other.dims) or self.context.shape != other.context.shape:
            raise InterpError("examples of other coordinates, numbers or contexts do not merge")
        names = ("value", "row", "pos", "id", "context")
        both = {name: torch.cat([getattr(self, name), getattr(other, name)]) for name in names}
        order = torch.arange(len(both["value"]))[:, None].expand(both["value"].shape)
        for name, down in (("pos", False), ("row", False), ("value", True)):  # the last sort decides first
            order = order.gather(0, both[name].gather(0, order).sort(dim=0, descending=down, stable=True).indices)
        order = order[: len(self.value)]
        best = {name: both[name].gather(0, order) for name in names[:-1]}
        wide = order[..., None].expand(*order.shape, self.context.shape[-1])
        return Examples(dims=self.dims, **best, context=both["context"].gather(0, wide))


class TopExamples:
    """Examples of every coordinate, or of some; `result()` is site -> Examples."""

    def __init__(self, n: int = 10, *, dims: Sequence[int] | None = None, before: int = 8, after: int = 4) -> None:
        if n < 1 or before < 0 or after < 0:
            raise InterpError(f"n={n} must be at least 1, before={before} and after={after} not below 0")
        self.n, self.dims, self.before, self.after = n, None if dims is None else list(dims), before, after
        self._found: dict[str, Examples] = {}

    def update(self, batch: Batch, acts: Rows) -> None:
        if len(acts) == 0:
            return
        order = in_order(acts)
        windows = self._windows(batch, acts)[order]
        row, pos, ids = acts.tokens
        columns = {
            "row": row[order],
            "pos": pos[order],
            "id": torch.full_like(row, -1) if ids is None else ids[order],
        }
        for site in acts:
            flat = flattened(site, acts)[order]
            dims = self._watched(site, flat.shape[1])
            flat = flat if self.dims is None else flat[:, dims]
            held = self._found.get(site) or self._empty(dims, windows.shape[1])
            # Only coordinates that reach the least value held can change.
            hot = (flat.amax(dim=0) >= held.value[-1]).nonzero()[:, 0]
            for part in hot.split(max(1, CHUNK_NUMBERS // len(flat))):
                at = _first_n(flat[:, part], self.n)
                new = Examples(
                    dims=dims[part],
                    value=_filled(flat[:, part].gather(0, at), self.n, float("-inf")),
                    **{name: _filled(column[at], self.n, -1) for name, column in columns.items()},
                    context=_filled(windows[at], self.n, -1),
                )
                held = _put(held, part, _only(held, part).merge(new))
            self._found[site] = held

    def result(self) -> dict[str, Examples]:
        return dict(self._found)

    def state(self) -> dict[str, Tensor]:
        names = Examples.__dataclass_fields__
        return {f"{site}/{name}": getattr(found, name) for site, found in self._found.items() for name in names}

    def merge(self, state: Mapping[str, Tensor]) -> None:
        for site, tensors in by_site(state).items():
            found = Examples(**tensors)
            self._found[site] = self._found[site].merge(found) if site in self._found else found

    def clear(self) -> None:
        self._found = {}

    def _watched(self, site: str, d: int) -> Tensor:
        if self.dims is not None and not all(0 <= dim < d for dim in self.dims):
            raise InterpError(f"{site} has coordinates 0 to {d - 1}, asked for {self.dims}")
        return torch.arange(d) if self.dims is None else torch.tensor(self.dims, dtype=torch.int64)

    def _empty(self, dims: Tensor, width: int) -> Examples:
        blank = torch.full((self.n, len(dims)), -1)
        return Examples(
            dims=dims,
            value=torch.full(blank.shape, float("-inf")),
            row=blank,
            pos=blank,
            id=blank,
            context=torch.full((*blank.shape, width), -1, dtype=torch.int32),
        )

    def _windows(self, batch: Batch, acts: Rows) -> Tensor:
        """The ids around each row; no columns where the input is no text."""
        if batch.record is None:
            return torch.zeros(len(acts), 0, dtype=torch.int32)
        ids = torch.where(batch.record.mask, batch.record.ids, -1).int()
        ids = torch.nn.functional.pad(ids, (self.before, self.after), value=-1)
        return ids.unfold(1, self.before + 1 + self.after, 1)[acts.item, acts.tokens[1]]


def _first_n(x: Tensor, n: int) -> Tensor:
    """Row indices of the n largest of each column, the first of equals first: (min(n, rows), columns)."""
    bits = (x + 0.0).view(torch.int32).long()  # + 0.0 turns -0.0 into 0.0
    image = torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))  # ordered as the floats are
    later = len(x) - 1 - torch.arange(len(x))
    keys = (image << 32) + later[:, None]
    return keys.T.contiguous().topk(min(n, len(x)), dim=1).indices.T


def _filled(x: Tensor, n: int, value: float) -> Tensor:
    """At least n rows, the missing ones filled with a value."""
    missing = n - len(x)
    return x if missing <= 0 else torch.cat([x, x.new_full((missing, *x.shape[1:]), value)])


def _only(held: Examples, part: Tensor) -> Examples:
    names = ("value", "row", "pos", "id", "context")
    return Examples(dims=held.dims[part], **{name: getattr(held, name)[:, part] for name in names})


def _put(held: Examples, part: Tensor, new: Examples) -> Examples:
    names = ("value", "row", "pos", "id", "context")
    return Examples(
        dims=held.dims, **{name: getattr(held, name).index_copy(1, part, getattr(new, name)) for name in names}
    )


def _few(dims: Tensor) -> str:
    shown = ", ".join(map(str, dims[:8].tolist()))
    return shown + (f", ... ({len(dims)})" if len(dims) > 8 else "")
