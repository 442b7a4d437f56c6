"""What a capture does with the values the hub brings: keep by reference, copy, pick positions, join a generation.

Values are shared with the model where that is safe; their version counters tell later whether they were overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from interp.core.errors import InterpError, NeverFiredError
from interp.core.sites import Part, Site
from interp.instrument.activations import Activations, CaptureBuffers, CaptureReceipt, Record, joined
from interp.instrument.finite import Extremes, Finite
from interp.instrument.guards import in_backward
from interp.instrument.select import At, Scope, columns, position_axis, selected
from interp.models.attention import AttentionCall, Later
from interp.models.model import LoadedModel


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a capture keeps what it sees; see `capture`."""

    at: At
    heads: Sequence[int] | None
    grad: bool
    stop: bool
    dtype: torch.dtype | None
    device: torch.device | str | None
    scope: Scope
    snapshot: bool
    finite: Finite
    buffers: CaptureBuffers | None


class Collector:
    """Collects what the hub's readers bring."""

    def __init__(self, model: LoadedModel, sites: list[Site], options: Options) -> None:
        self.model, self.options = model, options
        buffers = options.buffers
        if buffers is not None:
            buffers.turn += 1
        self.acts = Activations(model, sites, buffers=buffers, turn=buffers.turn if buffers else 0)
        self.generated: dict[tuple[Site, int], list[Record]] = {}
        """What each generation brought, call by call."""
        self.now, self.left = -1, set[Site]()
        """Number of the last forward in which any site fired, and those that have not yet."""
        self.reached: dict[tuple[Site, int], int] = {}
        """First position of each generation that has not been computed yet; without a cache positions come again."""
        self.finite = Extremes(options.finite)
        self.attended: tuple[AttentionCall | None, Any] = (None, None)
        """The attention call that was last copied into buffers, and the copy."""
        self._columns: dict[tuple[int, int, int] | int, Tensor] = {}

    def columns(self, n_pos: int) -> Tensor:
        """Absolute positions of this forward's columns; records share them."""
        call = self.model.hub.call
        key = n_pos if call is None else (call.past, call.n_pos, n_pos)
        found = self._columns.get(key)
        if found is None:
            found = self._columns[key] = columns(call, n_pos)
        return found

    def reader(self, site: Site, value: Tensor, raw: Tensor) -> None:
        if in_backward():
            return  # gradient checkpointing computes it a second time
        options, call = self.options, self.model.hub.call
        axis = _axis(site, value)
        self._fired(site)
        generating = call is not None and call.prompt is not None
        if options.at is not None and axis is None:
            raise InterpError(f"{site} is {tuple(value.shape)} here, without a position axis; drop positions")
        if options.grad and generating:
            raise InterpError("generation runs without gradients; capture(grad=True) takes model(tokens)")
        looks = options.finite != "off"
        if looks and options.dtype is None:
            self.finite.look(str(site), value)
        if options.grad:
            where = torch.arange(value.shape[axis] if axis is not None else 0)
            self._keep(site, Record(value, raw, where))
            return
        where = self.columns(value.shape[axis]) if axis is not None else _NOWHERE
        if axis is not None and (options.at is not None or options.scope != "all" or generating):
            kept, where = self._pick(site, value, where, axis)
            kept = kept.to(dtype=options.dtype or kept.dtype, device=options.device or kept.device)
            record = Record(kept.detach(), None, where)
        else:
            record = self._whole(site, value, where)
        if looks and options.dtype is not None and isinstance(record.kept, Tensor):
            self.finite.look(str(site), record.kept)
        self._keep(site, record)

    def later(self, site: Site, later: Later) -> None:
        """Scores or a pattern of a whole forward: computed when read, if that keeps less memory."""
        if in_backward():
            return
        call, held = self.model.hub.call, self.model.hub.held
        unseen = {t.data_ptr(): t.numel() * t.element_size() for t in later.needs if t.data_ptr() not in held}
        cached = later.past or later.shape[2] != later.shape[3] or (call is not None and call.prompt is not None)
        larger = sum(unseen.values()) > later.shape.numel() * later.dtype.itemsize
        if cached or larger or any(t.is_inference() for t in later.needs):
            value = later.value()
            self.reader(site, value, value)
            return
        self._fired(site)
        copied = self.options.buffers is not None
        if copied:
            later = replace(later, call=self._buffered(site, later.call))
        else:  # the values of the attention are not needed
            later = replace(later, call=replace(later.call, value=later.call.key))
            held.update(unseen)
        versions = tuple((t, t._version) for t in later.needs if not copied or t is later.call.mask)
        self._keep(site, Record(later, None, self.columns(later.shape[2]), versions))

    def _buffered(self, site: Site, call: AttentionCall) -> AttentionCall:
        """The call with query and key in buffers; scores and pattern of one call share them."""
        buffers, (seen, copied) = self.options.buffers, self.attended
        if buffers is None or seen is call:
            return copied
        number, of = len(self.acts.records.get(site, ())), replace(site, part=Part.Z)
        query = buffers.fill((of, "query"), number, call.query, call.query.dtype)
        key = buffers.fill((of, "key"), number, call.key, call.key.dtype)
        self.attended = call, replace(call, query=query, key=key, value=key)
        return self.attended[1]

    def _whole(self, site: Site, value: Tensor, where: Tensor) -> Record:
        """By reference where the value keeps nothing larger alive and nothing is in place; else a copy."""
        options = self.options
        if options.buffers is not None or options.dtype is not None or options.device is not None:
            dtype, device = options.dtype or value.dtype, torch.device(options.device or value.device)
            if options.buffers is not None and device == value.device and site.part is not Part.LOGITS:
                number = len(self.acts.records.get(site, ()))
                return Record(options.buffers.fill((site, ""), number, value, dtype), None, where)
            moved = value.to(dtype=dtype, device=device)
            if moved is not value:
                return Record(moved.detach(), None, where)
        larger = value.untyped_storage().nbytes() > 1.5 * value.numel() * value.element_size()
        if options.snapshot or site.path is not None or larger or value.is_inference():
            return Record(value.detach().clone(), None, where)
        place, held = value.data_ptr(), self.model.hub.held
        shared = site.part is Part.LOGITS or place in held
        held.add(place)
        kept = value.detach()
        return Record(kept, None, where, ((kept, kept._version),), shared)

    def _pick(self, site: Site, value: Tensor, where: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """Copy of the wanted positions; while generating, only those not seen before."""
        call, options = self.model.hub.call, self.options
        mask = selected(options.at, options.scope, call, value.shape[0], value.shape[axis])
        if call is not None and call.prompt is not None:
            key = (site, call.generation)
            mask = mask & (where >= self.reached.get(key, 0))
            self.reached[key] = max(self.reached.get(key, 0), int(where[-1]) + 1)
        counts = mask.sum(1)
        if int(counts.min()) != int(counts.max()):
            raise InterpError(
                f"rows of {site} would keep unequal numbers of positions; give one position per row or none"
            )
        index = mask.nonzero()[:, 1].view(value.shape[0], -1).to(value.device)
        moved = value.movedim(axis, 1)
        gather = index.view(*index.shape, *[1] * (moved.ndim - 2)).expand(-1, -1, *moved.shape[2:])
        return moved.gather(1, gather).movedim(1, axis), where[index[0].cpu()] if len(index) else where[:0]

    def _keep(self, site: Site, record: Record) -> None:
        call, kept = self.model.hub.call, record.kept
        if call is not None and call.prompt is not None and (isinstance(kept, Later) or _axis(site, kept) is not None):
            if len(record.where):
                self.generated.setdefault((site, call.generation), []).append(record)
            self.acts.records.setdefault(site, [])
            return
        self.acts.records.setdefault(site, []).append(record)

    def _fired(self, site: Site) -> None:
        now = self.model.hub.n_forward
        if self.now != now:
            self.now, self.left = now, set(self.acts.sites)
        self.left.discard(site)

    def waits(self) -> bool:
        """Whether some site has not fired in this forward, or the capture wants all of it."""
        return not self.options.stop or self.now != self.model.hub.n_forward or bool(self.left)

    def finish(self, seconds: float) -> None:
        """Join what a generation brought, check that nothing was overwritten and nothing is missing."""
        fired, options = self.acts.records, self.options
        restricted = options.at is not None or options.scope != "all"
        for (site, _), records in self.generated.items():
            axis = _axis(site, records[0].value)
            fired[site] = [*fired.get(site, []), joined(records, axis if axis is not None else 1)]
        missing = [site for site in self.acts.sites if not fired.get(site)]
        if missing:
            raise NeverFiredError(
                f"{len(missing)} of {len(self.acts.sites)} sites never fired, first {missing[0]}: call the model inside"
                f" the capture, with a path that runs this module (scope={options.scope!r})"
            )
        for site, records in fired.items():
            if restricted and _axis(site, records[0].value) is not None and not any(len(r.where) for r in records):
                raise NeverFiredError(
                    f"no position of {site} was kept: positions={options.at!r}, scope={options.scope!r}"
                )
            if any(record.overwritten for record in records):
                raise InterpError(f"{site} was overwritten in place after it was captured; pass snapshot=True")
        self.acts.checked = True
        every = [record for records in fired.values() for record in records]
        self.acts.receipt = CaptureReceipt(
            calls={str(site): len(fired[site]) for site in self.acts.sites},
            n_tokens=max((len(r.where) * r.shape[0] for r in every if r.shape), default=0),
            n_bytes=sum(record.n_bytes for record in every),
            seconds=seconds,
            nonfinite=self.finite.report(),
        )


_NOWHERE = torch.arange(0)


def _axis(site: Site, value: Tensor) -> int | None:
    """The position axis; a module path is taken to have one if its value looks like (batch, pos, width)."""
    return (1 if value.ndim == 3 else None) if site.part is Part.MODULE else position_axis(site)
