"""What one batch gave at some sites, as rows: real tokens only, each with its row, position and token id.

Shared by everything that reads a stream: the store writes the rows, observers look at them. A site either has a
position axis (one row per real token) or has none (one row per item, position 0); one pass takes one kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.core.errors import InterpError, unknown
from interp.core.sites import Part, Site
from interp.instrument.capture import capture
from interp.instrument.select import position_axis
from interp.instrument.stream import Batch
from interp.models.model import LoadedModel

Tokens = tuple[Tensor, Tensor, Tensor | None]
"""Row number, position and token id of each row; no ids where the input is no text."""


@runtime_checkable
class Values(Protocol):
    """What a capture holds: a tensor per site."""

    def __getitem__(self, site: Any, /) -> Tensor: ...


class Rows:
    """Activations of one batch: `rows[site]` is (n, ...), a row per real token, in the model's dtype."""

    def __init__(self, batch: Batch, sites: Sequence[Site], acts: Values) -> None:
        if not sites:
            raise InterpError("no sites were asked for; model.sites() lists them")
        self.batch, self.sites = batch, tuple(sites)
        self._acts, self._by_name = acts, {str(site): site for site in sites}
        first = self._mask(sites[0])
        for site in sites[1:]:
            if (mask := self._mask(site)).shape != first.shape:
                raise InterpError(
                    f"{site} has rows of another kind ({tuple(mask.shape)}) than {sites[0]} ({tuple(first.shape)}):"
                    " sites with and without a position axis go into two stores"
                )
        self.kept: Bool[Tensor, "batch *pos"] = first
        self.tokens: Tokens = _tokens(first, batch)

    def __getitem__(self, site: str | Site) -> Tensor:
        name = str(site)
        if name not in self._by_name:
            raise unknown("captured site", name, self._by_name)
        values = self._acts[self._by_name[name]].detach()
        mask = self.kept
        return values.flatten(0, mask.ndim - 1) if bool(mask.all()) else values[mask.to(values.device)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        """Number of rows, the same at every site."""
        return len(self.tokens[0])

    @property
    def item(self) -> Int[Tensor, " n"]:
        """Which item of the batch each row belongs to, counted from 0."""
        return self.kept.nonzero()[:, 0]

    def _mask(self, site: Site) -> Tensor:
        """Which (item, position) of the value are rows; one axis where the value has no positions."""
        values, batch = self._acts[site], self.batch
        real = batch.real
        if real is not None and batch.inputs is None:
            if values.ndim < 3 or values.shape[:2] != real.shape:
                raise InterpError(
                    f"{site} has shape {tuple(values.shape)}; a store takes sites with axes batch, pos, ..."
                )
            return real
        if values.ndim < 2 or len(values) != len(batch.rows):
            raise InterpError(
                f"{site} has shape {tuple(values.shape)}; its first axis must be the {len(batch.rows)} rows"
            )
        axis = (1 if values.ndim == 3 else None) if site.part is Part.MODULE else position_axis(site)
        if axis is None:
            return torch.ones(len(values), dtype=torch.bool)
        if axis != 1 or (real is not None and values.shape[:2] != real.shape):
            raise InterpError(f"{site} has shape {tuple(values.shape)}; a store takes sites with axes batch, pos, ...")
        return torch.ones(values.shape[:2], dtype=torch.bool) if real is None else real


def run_batch(model: LoadedModel, batch: Batch, sites: Sequence[Site]) -> Rows:
    """One forward pass of the model over a batch."""
    with capture(model, sites) as acts:
        model(batch.feed)
    return Rows(batch, sites, acts)


def _tokens(mask: Tensor, batch: Batch) -> Tokens:
    if mask.ndim == 1:
        return batch.rows, torch.zeros_like(batch.rows), None
    row, pos = mask.nonzero(as_tuple=True)
    return batch.rows[row], pos, None if batch.record is None else batch.record.ids[mask]
