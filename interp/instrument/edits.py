"""Edits: change activations while the model runs, and know what was changed.

    with edited(model, [add("resid_post.12", 4 * v, at=last), zero("z.11", head=3)]) as receipt:
        model(tokens)
    receipt[0].moved        # how far the activation was moved, relative to its norm

An edit is a pure function of the activation; several at one site run in the order of the list. Where an edit applies
is said by `at` (positions), `head` and `dims`; everything else keeps its bits. An edit that never fires, or touches
no token, is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from interp.core.errors import InterpError, NeverFiredError
from interp.core.seed import torch_generator
from interp.core.sites import Site
from interp.instrument.applied import Applied, Context, Edit, EditFunction, EditReceipt
from interp.instrument.guards import check_instrumentable
from interp.instrument.select import Scope, check_scope, last, position_axis
from interp.models.model import LoadedModel

__all__ = [
    "Context", "Edit", "EditFunction", "EditReceipt", "add", "clamp_feature", "edited", "last", "mean",
    "patch_from", "project_out", "resample", "rotate", "scale", "set_to", "zero",
]  # fmt: skip


def _broadcast(value: Tensor | float, like: Tensor, site: Site) -> Tensor:
    """The value in the activation's dtype, device and shape."""
    tensor = torch.as_tensor(value).to(like)
    try:
        return tensor.expand_as(like)
    except RuntimeError as error:
        raise InterpError(
            f"a value of shape {tuple(tensor.shape)} does not fit {site}, which is {tuple(like.shape)} here"
        ) from error


def _checked(vector: Tensor, x: Tensor, site: Site) -> Tensor:
    if vector.ndim != 1 or vector.shape[0] != x.shape[-1]:
        raise InterpError(
            f"a direction of shape {tuple(vector.shape)} does not fit {site}, whose width is {x.shape[-1]}"
        )
    return vector.to(x)


def add(site: str | Site, vector: Tensor | float, **where: Any) -> Edit:
    """x + vector; the vector broadcasts, e.g. (d,), (batch, 1, d) for one per row, or (head, d_head)."""
    return Edit(site, lambda x, c: x + _broadcast(vector, x, c.site), label="add", **where)


def scale(site: str | Site, factor: float, **where: Any) -> Edit:
    """x * factor."""
    return Edit(site, lambda x, _: x * factor, label="scale", **where)


def set_to(site: str | Site, value: Tensor | float, **where: Any) -> Edit:
    """The value itself, broadcast."""
    return Edit(site, lambda x, c: _broadcast(value, x, c.site), label="set", **where)


def zero(site: str | Site, **where: Any) -> Edit:
    """Zero ablation."""
    return Edit(site, lambda x, _: torch.zeros_like(x), label="zero", **where)


def mean(site: str | Site, reference: Tensor, **where: Any) -> Edit:
    """Mean ablation: the average of reference activations of this site over batch and positions, per head."""

    def function(x: Tensor, context: Context) -> Tensor:
        axis = position_axis(context.site)
        return _broadcast(reference.mean(dim=(0,) if axis is None else (0, axis), keepdim=True), x, context.site)

    return Edit(site, function, label="mean", **where)


def resample(site: str | Site, pool: Tensor, *, seed: int, **where: Any) -> Edit:
    """Each row takes the activation of a random row of the pool (n, pos, ...), position by position; the same row for
    all of a forward or generation, another in the next.
    """

    def function(x: Tensor, context: Context) -> Tensor:
        generator = torch_generator(seed, str(context.site), context.run)
        rows = torch.randint(len(pool), (x.shape[0],), generator=generator)
        return _at_positions(pool[rows.to(pool.device)], x, context)

    return Edit(site, function, label="resample", **where)


def project_out(site: str | Site, direction: Tensor, **where: Any) -> Edit:
    """x - (x . v) v for the unit vector v along `direction` (d,)."""

    def function(x: Tensor, context: Context) -> Tensor:
        unit = torch.nn.functional.normalize(_checked(direction, x, context.site), dim=0)
        return x - (x @ unit)[..., None] * unit

    return Edit(site, function, label="project_out", **where)


def rotate(site: str | Site, matrix: Tensor, **where: Any) -> Edit:
    """x @ matrix, with a matrix (d, d)."""

    def function(x: Tensor, context: Context) -> Tensor:
        if matrix.shape != (x.shape[-1], x.shape[-1]):
            raise InterpError(
                f"a matrix of shape {tuple(matrix.shape)} does not fit {context.site}, width {x.shape[-1]}"
            )
        return x @ matrix.to(x)

    return Edit(site, function, label="rotate", **where)


def patch_from(site: str | Site, donor: Tensor, **where: Any) -> Edit:
    """The donor's activation at the same site and positions (activation patching)."""
    return Edit(site, lambda x, c: _at_positions(donor, x, c), label="patch_from", **where)


@runtime_checkable
class Features(Protocol):
    """What `clamp_feature` needs of a dictionary: codes, and one row per feature in the units of the activation."""

    @property
    def features(self) -> Tensor: ...
    def encode(self, x: Tensor) -> Any: ...


def clamp_feature(site: str | Site, dictionary: Features, feature: int, value: float, **where: Any) -> Edit:
    """Move one latent to `value`, leaving the dictionary's error as it is: x + (value - f) features[feature]."""
    width = dictionary.features.shape[0]
    if not 0 <= feature < width:
        raise InterpError(f"feature {feature} is outside the dictionary, which has features 0 to {width - 1}")

    def function(x: Tensor, _: Context) -> Tensor:
        current = (
            dictionary.encode(x.flatten(0, -2).to(dictionary.features.dtype)).dense()[:, feature].view(x.shape[:-1])
        )
        return x + (value - current)[..., None].to(x) * dictionary.features[feature].to(x)

    return Edit(site, function, label="clamp_feature", **where)


def _at_positions(donor: Tensor, x: Tensor, context: Context) -> Tensor:
    """The donor's values at the positions this forward computes; a donor of one position serves all of them."""
    axis = position_axis(context.site)
    if axis is None or donor.ndim != x.ndim or donor.shape[axis] == 1:
        return _broadcast(donor, x, context.site)
    n = donor.shape[axis]
    outside = context.where[context.chosen.any(0).cpu() & (context.where >= n)]
    if len(outside):
        raise InterpError(
            f"the donor for {context.site} has positions 0 to {n - 1}, position {int(outside[0])} is asked for; "
            'choose positions with at, or scope="prompt" while generating'
        )
    taken = donor.index_select(axis, context.where.clamp_max(n - 1).to(donor.device))
    return _broadcast(taken, x, context.site)


@contextmanager
def edited(
    model: LoadedModel, edits: Edit | Sequence[Edit], *, scope: Scope = "all"
) -> Generator[list[EditReceipt], None, None]:
    """Apply edits to every forward of `model` inside the block; yields one receipt per edit.

    An edit whose site is a pattern is applied at each site it stands for. While generating, `scope` says whether
    `prompt` tokens, `new` ones, or `all` are edited; the result does not depend on the key-value cache.
    Raises SiteError for unknown sites, NeverFiredError if an edit did not fire or touched no token.
    """
    check_scope(scope)
    listed: list[object] = list(edits) if isinstance(edits, Sequence) else [edits]
    if not listed:
        raise InterpError("no edits were given")
    asked = [_an_edit(item) for item in listed]
    check_instrumentable(model, grad=True)
    spread = [replace(edit, site=site) for edit in asked for site in model.resolve(edit.site)]
    applied = [Applied(model, edit, scope) for edit in spread]
    waits = _waits(model, applied)
    model.hub.pending.append(waits)
    try:
        with ExitStack() as attached:
            for item in applied:
                attached.callback(model.hub.add_writer(item.site, item.writer))
            yield [item.receipt for item in applied]
        for item in applied:
            if not item.receipt.n_tokens:
                reason = "touched no token" if item.receipt.fired else "never fired"
                raise NeverFiredError(
                    f"the edit {item.receipt.label} of {item.site} {reason}: call the model inside the block; "
                    f"scope={scope!r}, at={item.edit.at!r}"
                )
    finally:
        model.hub.pending.remove(waits)


def _an_edit(given: object) -> Edit:
    if not isinstance(given, Edit):
        raise InterpError(f"{given!r} is no edit; make one with add, zero, set_to, ... or Edit(site, function)")
    return given


def _waits(model: LoadedModel, applied: list[Applied]) -> Callable[[], bool]:
    """Beside a capture that may stop, edits only need to have fired in this forward."""
    return lambda: any(item.last_forward != model.hub.n_forward for item in applied)
