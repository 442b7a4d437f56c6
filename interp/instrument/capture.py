"""Capture: activations at named sites, as they were when the model computed them.

    with capture(model, ["resid_post.*", "gate.3"]) as acts:
        model(tokens)
    acts["gate.3"]          # (batch, pos, d_mlp)

The model is not changed and no number moves. The forward ends after the deepest site asked for (`stop=True`); a site
that never fires is an error; nothing stays hooked, also after an exception. While `model.generate` runs, the calls of
one generation are joined along the position axis, each position once, whether or not the key-value cache is on.

Values of a known family are kept by reference, which costs nothing, and their version is checked when the capture
ends: a model that writes into an activation afterwards is an error that asks for `snapshot=True`. Module-path sites
are copied, since any network may work in place. Scores and patterns are computed when they are read, from query, key
and mask, where these take less memory. Half precision overflows: there, values that are not finite are reported.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch

from interp.core.errors import InterpError
from interp.core.sites import Part, Site
from interp.instrument.activations import Activations, CaptureBuffers, CaptureReceipt, Record
from interp.instrument.collect import Collector, Options
from interp.instrument.finite import Finite, NonFiniteWarning, how_to_look
from interp.instrument.guards import check_instrumentable, frozen
from interp.instrument.select import At, Scope, check_scope, chosen_heads, has_heads
from interp.models.model import LoadedModel

__all__ = ["Activations", "CaptureBuffers", "CaptureReceipt", "Finite", "NonFiniteWarning", "Record", "capture"]


RECOMPUTED = (Part.ATTN_SCORES, Part.PATTERN)
"""What the hub computes again beside the model's own attention."""


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
    finite: Finite | None = None,
    buffers: CaptureBuffers | None = None,
) -> Generator[Activations, None, None]:
    """Capture sites of every forward of `model` inside the block.

    positions: which tokens to keep (see `interp.instrument.select`); they are copied, so that the rest is freed.
    heads: which heads of sites with a head axis; scores and patterns are recomputed for these alone.
    grad: keep the values in the graph; after backward, `acts.grad(site)`. Parameters are frozen meanwhile: they get no
        gradient, and the graph begins at the first site.
    stop: end a forward called through `model` after the deepest site; module-path sites run it to the end.
    scope: while generating, `prompt`, `new` (tokens fed back) or `all`.
    finite: look for NaN and infinity: `warn` names the first site, `raise` refuses; `receipt.nonfinite` lists them.
        By default half precision, the model's or `dtype`, warns, and others are not looked at.
    buffers: memory to fill, used again by the next capture; faster where many sites are captured again and again.
    Raises SiteError for unknown sites, NeverFiredError if a site did not fire, InterpError if a value was overwritten.
    """
    check_scope(scope)
    found = model.resolve(sites)
    if not found:
        raise InterpError("no sites were asked for; model.sites() lists them")
    if grad and (positions is not None or heads is not None or dtype is not None or device is not None):
        raise InterpError("grad=True keeps whole tensors where they are; drop positions, heads, dtype and device")
    if grad and buffers is not None:
        raise InterpError("grad=True keeps the values in the graph, not in buffers; drop one of the two")
    check_instrumentable(model, grad=grad)
    chosen = chosen_heads(model, found, heads)
    plain = positions is None and dtype is None and device is None and scope == "all" and not snapshot and not grad
    looked = how_to_look(finite, model.dtype, dtype)
    lazy = plain and looked == "off"
    options = Options(
        at=positions, heads=chosen, grad=grad, dtype=dtype, device=device, scope=scope, snapshot=snapshot,
        finite=looked, buffers=buffers,
        stop=stop and not grad and all(site.part is not Part.MODULE for site in found),
    )  # fmt: skip
    collector = Collector(model, found, options)
    model.hub.pending.append(collector.waits)
    model.hub.stoppers += options.stop
    model.wants_grad += grad
    started = time.perf_counter()
    try:
        with ExitStack() as attached:
            if grad:
                attached.enter_context(frozen(model.module))
            for site in found:
                reader = partial(collector.reader, site)
                wanted = chosen if has_heads(site) else None
                later = partial(collector.later, site) if lazy and site.part in RECOMPUTED else None
                attached.callback(model.hub.add_reader(site, reader, wanted, grad=grad, later=later))
            yield collector.acts
            collector.finish(time.perf_counter() - started)
    finally:
        model.wants_grad -= grad
        model.hub.stoppers -= options.stop
        model.hub.pending.remove(collector.waits)
