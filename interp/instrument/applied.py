"""One edit at work: what it may know, where its result is used, and what it moved.

The function of an edit sees the whole activation; positions, heads and dims say where its result replaces what was
there. It must return a new tensor of the same shape, dtype and device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from interp.core.errors import InterpError
from interp.core.sites import Site
from interp.instrument.guards import in_backward
from interp.instrument.select import At, Scope, chosen_numbers, columns, position_axis, selected
from interp.models.calls import Call
from interp.models.model import LoadedModel
from interp.models.views import check_same


@dataclass(frozen=True)
class Context:
    """What an edit may know about where it is."""

    site: Site
    where: Tensor
    """Absolute positions (pos,) of the activation's position axis."""
    call: int
    """How often this edit has fired before."""
    run: int
    """How many forwards it has fired in before; a generation counts as one, with the key-value cache or without."""
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


class Applied:
    """One edit, bound to a model for the duration of a context."""

    def __init__(self, model: LoadedModel, edit: Edit, scope: Scope) -> None:
        self.model, self.edit = model, edit
        self.scope: Scope = scope
        self.last_forward = 0
        """Number of the last forward in which it fired."""
        self.runs: dict[tuple[str, int], int] = {}
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
        if in_backward():
            raise InterpError(
                f"the edit of {self.site} ran a second time, in a backward pass: gradient checkpointing computes "
                "blocks again; switch it off while editing"
            )
        call = self.model.hub.call
        pos_axis = self.pos_axis if self.pos_axis is not None else (1 if x.ndim == 3 else None)
        n_pos = x.shape[pos_axis] if pos_axis is not None else 1
        where = columns(call, n_pos)
        chosen = selected(self.edit.at, self.scope, call, x.shape[0] if self.has_rows and x.ndim else 1, n_pos)
        context = Context(self.site, where, self.receipt.n_calls, self._run(call), chosen)
        self.receipt.n_calls += 1
        self.last_forward = self.model.hub.n_forward
        if not bool(chosen.any()):
            return x
        mask = self._mask(chosen.to(x.device), x, pos_axis)
        version = None if x.is_inference() else x._version
        new = self.edit.function(x, context)
        if version is not None and x._version != version:
            raise InterpError(f"the edit of {self.site} works in place; return a new tensor: x * 0, not x.mul_(0)")
        if not isinstance(cast(object, new), Tensor):
            raise InterpError(f"the edit of {self.site} returned {type(new).__name__}; return a tensor, x if unchanged")
        check_same(str(self.site), x, new)
        touched = torch.where(mask, new, x)
        self.receipt.note(torch.where(mask, x, 0), torch.where(mask, touched, 0), int(chosen.sum()))
        return touched

    def _run(self, call: Call | None) -> int:
        """Number of the forward or generation that is running, counted from the first that this edit has seen."""
        running = ("forward", self.model.hub.n_forward)
        if call is not None and call.prompt is not None:
            running = ("generation", call.generation)
        return self.runs.setdefault(running, len(self.runs))

    def _mask(self, chosen: Tensor, x: Tensor, pos_axis: int | None) -> Tensor:
        shape = [1] * x.ndim
        if self.has_rows and x.ndim:
            shape[0] = x.shape[0]
        if pos_axis is not None:
            shape[pos_axis] = x.shape[pos_axis]
        mask = chosen.view(shape)
        for name, axis, wanted in (("head", self.head_axis, self.edit.head), ("dims", x.ndim - 1, self.edit.dims)):
            if wanted is not None and axis is not None:
                _in_range(name, wanted, x.shape[axis], self.site)
                line = torch.zeros(x.shape[axis], dtype=torch.bool, device=x.device)
                line[chosen_numbers(name, wanted)] = True
                mask = mask & line.view([-1 if i == axis else 1 for i in range(x.ndim)])
        return mask


def _in_range(name: str, wanted: int | Sequence[int] | None, size: int | None, site: Site) -> None:
    listed = [] if wanted is None else chosen_numbers(name, wanted)
    if size is not None and any(not 0 <= item < size for item in listed):
        raise InterpError(f"{name}={wanted} is outside {site}, which has {name} 0 to {size - 1}")
