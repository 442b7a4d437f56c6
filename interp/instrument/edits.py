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
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from interp.core.errors import InterpError, NeverFiredError
from interp.core.seed import torch_generator
from interp.core.sites import Site
from interp.instrument.select import At, Scope, check_scope, columns, last, position_axis, selected
from interp.models.model import LoadedModel

__all__ = [
    "Context", "Edit", "EditReceipt", "add", "clamp_feature", "edited", "last", "mean", "patch_from", "project_out",
    "resample", "rotate", "scale", "set_to", "zero",
]  # fmt: skip


@dataclass(frozen=True)
class Context:
    """What an edit may know about where it is."""

    site: Site
    where: Tensor
    """Absolute positions (pos,) of the activation's position axis."""
    call: int
    """How often this edit has fired before."""
    chosen: Tensor
    """Bool (batch, pos): the tokens at which the result will be used."""


EditFunction = Callable[[Tensor, Context], Tensor]


@dataclass(frozen=True)
class Edit:
    """A pure function applied at a site; `at`, `head` and `dims` say where its result is used."""

    site: str | Site
    function: EditFunction
    at: At = None
    head: int | Sequence[int] | None = None
    dims: int | Sequence[int] | None = None
    label: str = "edit"


@dataclass
class EditReceipt:
    """What one edit did."""

    site: Site
    label: str
    n_calls: int = 0
    n_tokens: int = 0
    """Token positions touched, over all rows and calls."""
    _change: Tensor | None = field(default=None, repr=False)
    _norm: Tensor | None = field(default=None, repr=False)

    @property
    def fired(self) -> bool:
        return self.n_calls > 0

    @property
    def moved(self) -> float:
        """Norm of the change relative to the norm of what was there, over all touched tokens."""
        if self._change is None or self._norm is None:
            return 0.0
        change, norm = float(self._change.sqrt()), float(self._norm.sqrt())
        return change / norm if norm > 0 else (0.0 if change == 0 else float("inf"))

    def __str__(self) -> str:
        return f"{self.label} at {self.site}: {self.n_tokens} tokens in {self.n_calls} calls, moved by {self.moved:.3g}"

    def note(self, old: Tensor, new: Tensor, n_tokens: int) -> None:
        wide = torch.promote_types(old.dtype, torch.float32)
        before, after = old.detach().to(wide), new.detach().to(wide)
        masked = old.detach() == torch.finfo(old.dtype).min  # attention scores that the mask closes
        change = (after - before).masked_fill(masked, 0).square().sum()
        norm = before.masked_fill(masked, 0).square().sum()
        self._change = change if self._change is None else self._change + change
        self._norm = norm if self._norm is None else self._norm + norm
        self.n_tokens += n_tokens


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
    """Each row takes the activation of a random row of the pool (n, pos, ...), position by position."""

    def function(x: Tensor, context: Context) -> Tensor:
        generator = torch_generator(seed, str(context.site), context.call)
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


class _Applied:
    """One edit, bound to a model for the duration of a context."""

    def __init__(self, model: LoadedModel, edit: Edit, scope: Scope) -> None:
        self.model, self.edit = model, edit
        self.scope: Scope = scope
        self.last_forward = 0
        """Number of the last forward in which it fired."""
        self.site = model.table.one(edit.site)
        self.receipt = EditReceipt(self.site, edit.label)
        axes = model.table.axes(self.site)
        self.has_rows = axes[0] in ("batch", "...")
        """Whether the first axis counts sequences: a gate that is a parameter has none."""
        self.head_axis = next((i for i, axis in enumerate(axes) if axis in ("head", "kv_head")), None)
        self.pos_axis = position_axis(self.site)
        if edit.head is not None and self.head_axis is None:
            raise InterpError(f"{self.site} has no head axis; drop head={edit.head} or edit z, q, k, v or pattern")
        n_heads = model.dims.size(axes[self.head_axis]) if self.head_axis is not None else None
        _in_range("head", edit.head, n_heads, self.site)
        _in_range("dims", edit.dims, model.dims.size(axes[-1]), self.site)

    def writer(self, x: Tensor) -> Tensor:
        call = self.model.hub.call
        pos_axis = self.pos_axis if self.pos_axis is not None else (1 if x.ndim == 3 else None)
        n_pos = x.shape[pos_axis] if pos_axis is not None else 1
        where = columns(call, n_pos)
        chosen = selected(self.edit.at, self.scope, call, x.shape[0] if self.has_rows and x.ndim else 1, n_pos)
        context = Context(self.site, where, self.receipt.n_calls, chosen)
        self.receipt.n_calls += 1
        self.last_forward = self.model.hub.n_forward
        if not bool(chosen.any()):
            return x
        mask = self._mask(chosen.to(x.device), x, pos_axis)
        version = None if x.is_inference() else x._version
        new = self.edit.function(x, context)
        if version is not None and x._version != version:
            raise InterpError(f"the edit of {self.site} works in place; return a new tensor: x * 0, not x.mul_(0)")
        if new.shape != x.shape or new.dtype != x.dtype or new.device != x.device:
            raise InterpError(
                f"the edit of {self.site} turned {x.dtype} {tuple(x.shape)} on {x.device} into "
                f"{new.dtype} {tuple(new.shape)} on {new.device}; keep shape, dtype and device"
            )
        touched = torch.where(mask, new, x)
        self.receipt.note(torch.where(mask, x, 0), torch.where(mask, touched, 0), int(chosen.sum()))
        return touched

    def _mask(self, chosen: Tensor, x: Tensor, pos_axis: int | None) -> Tensor:
        shape = [1] * x.ndim
        if self.has_rows and x.ndim:
            shape[0] = x.shape[0]
        if pos_axis is not None:
            shape[pos_axis] = x.shape[pos_axis]
        mask = chosen.view(shape)
        for axis, wanted in ((self.head_axis, self.edit.head), (x.ndim - 1, self.edit.dims)):
            if wanted is not None and axis is not None:
                line = torch.zeros(x.shape[axis], dtype=torch.bool, device=x.device)
                line[torch.as_tensor(wanted, device=x.device)] = True
                mask = mask & line.view([-1 if i == axis else 1 for i in range(x.ndim)])
        return mask


def _in_range(name: str, wanted: int | Sequence[int] | None, size: int | None, site: Site) -> None:
    listed = [] if wanted is None else [wanted] if isinstance(wanted, int) else list(wanted)
    if size is not None and any(not 0 <= item < size for item in listed):
        raise InterpError(f"{name}={wanted} is outside {site}, which has {name} 0 to {size - 1}")


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
    listed = [edits] if isinstance(edits, Edit) else list(edits)
    if not listed:
        raise InterpError("no edits were given")
    spread = [replace(edit, site=site) for edit in listed for site in model.resolve(edit.site)]
    applied = [_Applied(model, edit, scope) for edit in spread]
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


def _waits(model: LoadedModel, applied: list[_Applied]) -> Callable[[], bool]:
    """Beside a capture that may stop, edits only need to have fired in this forward."""
    return lambda: any(item.last_forward != model.hub.n_forward for item in applied)
