"""What a capture holds: one record per firing of a site, and the receipt.

A record refers to the model's own memory, holds a copy, or knows how to compute its value when it is first read (scores
and patterns). Memory that has been overwritten since is noticed by its version counter, never handed out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from interp.core.errors import InterpError, NeverFiredError, unknown
from interp.core.sites import Site
from interp.models.attention import Later
from interp.models.model import LoadedModel


class CaptureBuffers:
    """Memory that captures of equal shapes fill one after another: `capture(..., buffers=buffers)`.

    Freshly allocated memory fills at a fifth of the speed of memory already held, so a capture of many sites that is
    repeated runs faster with buffers. Values belong to the buffers: the next capture with them overwrites the last.
    """

    def __init__(self) -> None:
        self.turn = 0
        """Number of the capture that filled them last."""
        self._held: dict[tuple[tuple[Site, str], int], Tensor] = {}

    def fill(self, name: tuple[Site, str], number: int, value: Tensor, dtype: torch.dtype) -> Tensor:
        """The buffer of this name and firing, with this value in it."""
        held = self._held.get((name, number))
        if held is None or held.shape != value.shape or held.dtype != dtype or held.device != value.device:
            held = self._held[name, number] = torch.empty(value.shape, dtype=dtype, device=value.device)
        return held.copy_(value.detach())

    @property
    def n_bytes(self) -> int:
        return sum(value.numel() * value.element_size() for value in self._held.values())


@dataclass(eq=False)
class Record:
    """One firing of one site."""

    kept: Tensor | Later
    raw: Tensor | None
    """Kept only when gradients are wanted."""
    where: Tensor
    """Absolute positions of the value's position axis."""
    versions: tuple[tuple[Tensor, int], ...] = ()
    """Tensors of the model that are kept by reference, with their version counters."""
    shared: bool = False
    """Whether the memory belongs to somebody else too; it is copied when first read."""

    @property
    def shape(self) -> torch.Size:
        return self.kept.shape

    @property
    def n_bytes(self) -> int:
        return self.shape.numel() * self.kept.dtype.itemsize

    @property
    def overwritten(self) -> bool:
        return any(tensor._version != version for tensor, version in self.versions)

    @property
    def value(self) -> Tensor:
        if isinstance(self.kept, Later):
            self.kept, self.versions = self.kept.value(), ()
        if self.shared:
            self.kept, self.versions, self.shared = self.kept.clone(), (), False
        return self.kept


def joined(records: list[Record], axis: int) -> Record:
    """Positions of several calls after another; patterns are padded with zeros to the longest key axis."""
    values = [record.value for record in records]
    n_last = max(value.shape[-1] for value in values)
    padded = [torch.nn.functional.pad(value, (0, n_last - value.shape[-1])) for value in values]
    return Record(torch.cat(padded, dim=axis), None, torch.cat([record.where for record in records]))


@dataclass(frozen=True)
class CaptureReceipt:
    """What a capture saw."""

    calls: dict[str, int]
    """How often each site fired."""
    n_tokens: int
    """Token positions kept per site, at most."""
    n_bytes: int
    """Size of all values, whether they are held by reference, copied, or computed when read."""
    seconds: float
    nonfinite: dict[str, int] | None = None
    """Sites with NaN or infinity and how often they fired with one, in the order of firing; `None` if not looked at."""


@dataclass
class Activations:
    """What a capture holds. Index by site or name."""

    model: LoadedModel
    sites: list[Site]
    records: dict[Site, list[Record]] = field(default_factory=dict[Site, list[Record]])
    receipt: CaptureReceipt | None = None
    buffers: CaptureBuffers | None = None
    turn: int = 0
    """Which turn of the buffers this is."""
    checked: bool = False
    """Whether the capture has ended and its values were found untouched."""

    def __getitem__(self, site: str | Site) -> Tensor:
        """The activation of a site that fired once (or in one generation)."""
        records = self._of(site)
        if len(records) > 1:
            raise InterpError(f"{site} fired {len(records)} times; acts.calls({str(site)!r}) lists them in order")
        return records[0].value

    def calls(self, site: str | Site) -> list[Tensor]:
        """One tensor per firing, in order: a module used several times, or several forwards in one capture."""
        return [record.value for record in self._of(site)]

    def grad(self, site: str | Site) -> Tensor:
        """Gradient that reached the site in the last backward pass; needs capture(grad=True)."""
        record = self._of(site)[-1]
        if record.raw is None:
            raise InterpError(f"gradients were not asked for; use capture(model, [{str(site)!r}], grad=True)")
        if record.raw.grad is None:
            raise InterpError(f"no gradient has reached {site}: call backward() on something that depends on it first")
        n_rows = record.shape[0] if record.shape else 1
        return self.model.hub.of_gradient(self.model.table.one(site), record.raw.grad, n_rows)

    def stack(self, pattern: str) -> Tensor:
        """Sites of equal shape stacked along a new first axis, in the order of `model.resolve(pattern)`: that of the
        model's computation for a pattern like `resid_post.*`, that of the list for `resid_post.{2,0}`.
        """
        return torch.stack([self[site] for site in self.model.resolve(pattern)])

    def items(self) -> Iterator[tuple[Site, Tensor]]:
        for site in self.sites:
            yield site, self[site]

    def __contains__(self, site: str | Site) -> bool:
        return any(s in self.records for s in self.model.resolve(site))

    def __len__(self) -> int:
        return len(self.sites)

    def _of(self, site: str | Site) -> list[Record]:
        resolved = self.model.table.one(site)
        records = self.records.get(resolved)
        if not records:
            if resolved in self.sites:
                raise NeverFiredError(f"{resolved} has not fired yet: call the model inside the capture")
            raise unknown("captured site", str(resolved), map(str, self.sites))
        if self.buffers is not None and self.buffers.turn != self.turn:
            raise InterpError(f"the buffers that held {resolved} were filled again by a later capture; clone() first")
        for record in records:
            if record.overwritten and (record.shared or isinstance(record.kept, Later) or not self.checked):
                raise InterpError(f"{resolved} was overwritten in place after it was captured; pass snapshot=True")
        return records
