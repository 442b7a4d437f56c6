"""Capture: activations at named sites, as they were when the model computed them.

    with capture(model, ["resid_post.*", "gate.3"]) as acts:
        model(tokens)
    acts["gate.3"]          # (batch, pos, d_mlp)

The model is not changed and no number moves. The forward ends after the deepest site asked for (`stop=True`); a site
that never fires is an error; nothing stays hooked, also after an exception. While `model.generate` runs, the calls of
one generation are joined along the position axis, each position once, whether or not the key-value cache is on.

Values of a known family are kept by reference, which costs nothing, and their version is checked when the capture
ends: a model that writes into an activation afterwards is an error that asks for `snapshot=True`. Module-path sites
are copied, since any network may work in place.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from interp.core.errors import InterpError, NeverFiredError, unknown
from interp.core.sites import Part, Site
from interp.instrument.select import At, Scope, check_scope, columns, position_axis, selected
from interp.models.model import LoadedModel


@dataclass
class Record:
    """One firing of one site."""

    value: Tensor
    raw: Tensor | None
    """Kept only when gradients are wanted."""
    where: Tensor
    """Absolute positions of the value's position axis."""
    version: int | None
    """Version counter of a value kept by reference."""


@dataclass(frozen=True)
class CaptureReceipt:
    """What a capture saw."""

    calls: dict[str, int]
    """How often each site fired."""
    n_tokens: int
    """Token positions kept per site, at most."""
    n_bytes: int
    seconds: float


@dataclass
class Activations:
    """What a capture holds. Index by site or name."""

    model: LoadedModel
    sites: list[Site]
    records: dict[Site, list[Record]] = field(default_factory=dict[Site, list[Record]])
    receipt: CaptureReceipt | None = None

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
        n_rows = len(record.value) if record.value.ndim else 1
        return self.model.hub.of_gradient(self.model.table.one(site), record.raw.grad, n_rows)

    def stack(self, pattern: str) -> Tensor:
        """Sites of equal shape stacked along a new first axis, in layer order."""
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
        if not self.records.get(resolved):
            if resolved in self.sites:
                raise NeverFiredError(f"{resolved} has not fired yet: call the model inside the capture")
            raise unknown("captured site", str(resolved), map(str, self.sites))
        return self.records[resolved]


class _Capture:
    """Collects what the hub's readers bring."""

    def __init__(self, model: LoadedModel, sites: list[Site], options: _Options) -> None:
        self.model, self.options = model, options
        self.acts = Activations(model, sites)
        self.generated: dict[tuple[Site, int], list[Record]] = {}
        """What each generation brought, call by call."""
        self.last_forward: dict[Site, int] = {}
        """Number of the last forward in which each site fired."""
        self.reached: dict[tuple[Site, int], int] = {}
        """First position of each generation that has not been computed yet; without a cache positions come again."""

    def reader(self, site: Site, value: Tensor, raw: Tensor) -> None:
        options, call = self.options, self.model.hub.call
        axis = _axis(site, value)
        self.last_forward[site] = self.model.hub.n_forward
        generating = call is not None and call.prompt is not None
        if options.at is not None and axis is None:
            raise InterpError(f"{site} is {tuple(value.shape)} here, without a position axis; drop positions")
        if options.grad and generating:
            raise InterpError("generation runs without gradients; capture(grad=True) takes model(tokens)")
        if options.grad:
            where = torch.arange(value.shape[axis] if axis is not None else 0)
            self._keep(site, Record(value, raw, where, None))
            return
        where = columns(call, value.shape[axis]) if axis is not None else torch.arange(0)
        kept, picked = value, False
        if axis is not None and (options.at is not None or options.scope != "all" or generating):
            kept, where = self._pick(site, value, where, axis)
            picked = True
        moved = kept.to(dtype=options.dtype or kept.dtype, device=options.device or kept.device)
        version = None
        if moved is value or (moved is kept and not picked):
            moved, version = (moved.clone(), None) if self._must_copy(site, value) else (moved, value._version)
        self._keep(site, Record(moved.detach(), None, where, version))

    def _must_copy(self, site: Site, value: Tensor) -> bool:
        """By reference only where the value is nobody else's, keeps nothing larger alive and nothing is in place."""
        larger = value.untyped_storage().nbytes() > 1.5 * value.numel() * value.element_size()
        shared = site.part is Part.LOGITS or value.data_ptr() in self.model.hub.held
        self.model.hub.held.add(value.data_ptr())
        return self.options.snapshot or site.path is not None or larger or shared or value.is_inference()

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
        call = self.model.hub.call
        if call is not None and call.prompt is not None:
            if len(record.where):
                self.generated.setdefault((site, call.generation), []).append(record)
            self.acts.records.setdefault(site, [])
            return
        self.acts.records.setdefault(site, []).append(record)

    def waits(self) -> bool:
        """Whether some site has not fired in this forward, or the capture wants all of it."""
        now = self.model.hub.n_forward
        return not self.options.stop or any(self.last_forward.get(site) != now for site in self.acts.sites)

    def finish(self, seconds: float) -> None:
        """Join what a generation brought, check that nothing was overwritten and nothing is missing."""
        fired = self.acts.records
        for (site, _), records in self.generated.items():
            axis = _axis(site, records[0].value)
            fired[site] = [*fired.get(site, []), _join(records, axis if axis is not None else 1)]
        missing = [site for site in self.acts.sites if not fired.get(site)]
        if missing:
            raise NeverFiredError(
                f"{len(missing)} of {len(self.acts.sites)} sites never fired, first {missing[0]}: call the model inside"
                f" the capture, with a path that runs this module (scope={self.options.scope!r})"
            )
        for site, records in fired.items():
            for record in records:
                if record.version is not None and record.value._version != record.version:
                    raise InterpError(f"{site} was overwritten in place after it was captured; pass snapshot=True")
        values = [record.value for records in fired.values() for record in records]
        self.acts.receipt = CaptureReceipt(
            calls={str(site): len(fired[site]) for site in self.acts.sites},
            n_tokens=max(
                (len(r.where) * r.value.shape[0] for rs in fired.values() for r in rs if r.value.ndim), default=0
            ),
            n_bytes=sum(value.numel() * value.element_size() for value in values),
            seconds=seconds,
        )


@dataclass(frozen=True, kw_only=True)
class _Options:
    at: At
    heads: Sequence[int] | None
    grad: bool
    stop: bool
    dtype: torch.dtype | None
    device: torch.device | str | None
    scope: Scope
    snapshot: bool


def _axis(site: Site, value: Tensor) -> int | None:
    """The position axis; a module path is taken to have one if its value looks like (batch, pos, width)."""
    return (1 if value.ndim == 3 else None) if site.part is Part.MODULE else position_axis(site)


def _join(records: list[Record], axis: int) -> Record:
    """Positions of several calls after another; patterns are padded with zeros to the longest key axis."""
    values = [record.value for record in records]
    n_last = max(value.shape[-1] for value in values)
    padded = [torch.nn.functional.pad(value, (0, n_last - value.shape[-1])) for value in values]
    return Record(torch.cat(padded, dim=axis), None, torch.cat([record.where for record in records]), None)


@contextmanager
def capture(
    model: LoadedModel,
    sites: str | Site | Iterable[str | Site],
    *,
    positions: At = None,
    heads: int | Sequence[int] | None = None,
    grad: bool = False,
    stop: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    scope: Scope = "all",
    snapshot: bool = False,
) -> Generator[Activations, None, None]:
    """Capture sites of every forward of `model` inside the block.

    positions: which tokens to keep (see `interp.instrument.select`); they are copied, so that the rest is freed.
    heads: which heads of sites with a head axis; scores and patterns are recomputed for these alone.
    grad: keep the values in the graph; after backward, `acts.grad(site)`.
    stop: end a forward called through `model` after the deepest site; module-path sites run it to the end.
    scope: while generating, `prompt`, `new` (tokens fed back) or `all`.
    Raises SiteError for unknown sites, NeverFiredError if a site did not fire, InterpError if a value was overwritten.
    """
    check_scope(scope)
    found = model.resolve(sites)
    if not found:
        raise InterpError("no sites were asked for; model.sites() lists them")
    if grad and (positions is not None or heads is not None or dtype is not None or device is not None):
        raise InterpError("grad=True keeps whole tensors where they are; drop positions, heads, dtype and device")
    chosen = _heads(model, found, heads)
    options = _Options(
        at=positions, heads=chosen, grad=grad, dtype=dtype, device=device, scope=scope, snapshot=snapshot,
        stop=stop and not grad and all(site.part is not Part.MODULE for site in found),
    )  # fmt: skip
    collector = _Capture(model, found, options)
    model.hub.pending.append(collector.waits)
    model.hub.stoppers += options.stop
    model.wants_grad += grad
    started = time.perf_counter()
    try:
        with ExitStack() as attached:
            for site in found:
                reader = partial(collector.reader, site)
                wanted = chosen if _has_heads(site) else None
                attached.callback(model.hub.add_reader(site, reader, wanted, grad=grad))
            yield collector.acts
            collector.finish(time.perf_counter() - started)
    finally:
        model.wants_grad -= grad
        model.hub.stoppers -= options.stop
        model.hub.pending.remove(collector.waits)


def _has_heads(site: Site) -> bool:
    return bool({"head", "kv_head"} & set(site.info.axes))


def _heads(model: LoadedModel, sites: list[Site], heads: int | Sequence[int] | None) -> list[int] | None:
    if heads is None:
        return None
    listed = [heads] if isinstance(heads, int) else list(heads)
    for site in filter(_has_heads, sites):
        size = model.dims.size("kv_head" if "kv_head" in site.info.axes else "head") or 0
        if any(not 0 <= head < size for head in listed):
            raise InterpError(f"{site} has heads 0 to {size - 1}, asked for {listed}")
    if not any(map(_has_heads, sites)):
        raise InterpError(f"heads={listed} was given, but no site asked for has a head axis (z, q, k, v, pattern)")
    return listed
