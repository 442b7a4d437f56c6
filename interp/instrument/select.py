"""Positions: which tokens a capture keeps or an edit touches.

`None` is every position, an int or a list of ints are positions of every row (negative ones count from the end), an
integer tensor (batch,) is one position per row, a bool tensor (batch, pos) is a mask, and `last` is each row's last
real token of the prompt, padding left aside. Positions are columns of the input, absolute also while generating.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from operator import index
from typing import Literal, SupportsIndex

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.core.errors import InterpError
from interp.core.sites import PARTS, Site
from interp.models.calls import Call
from interp.models.model import LoadedModel


class Last(Enum):
    """The type of `last`."""

    LAST = "last"

    def __repr__(self) -> str:
        return "last"


last = Last.LAST
"""Each row's last real token of the prompt."""

At = None | SupportsIndex | Sequence[SupportsIndex] | Tensor | Last
Scope = Literal["prompt", "new", "all"]


_AXES = {
    part: next((i for i, axis in enumerate(info.axes) if axis in ("pos", "query")), None)
    for part, info in PARTS.items()
}


def position_axis(site: Site) -> int | None:
    """Which axis counts token positions (queries, for scores and patterns); `None` for a module path."""
    return _AXES[site.part]


def check_scope(scope: str) -> None:
    if scope not in ("prompt", "new", "all"):
        raise InterpError(f"scope={scope!r} is unknown; choose prompt, new or all")


def columns(call: Call | None, n_pos: int) -> Int[Tensor, " pos"]:
    """Absolute positions of the columns of this forward."""
    if call is None:
        return torch.arange(n_pos)
    first = call.past + max(0, call.n_pos - n_pos)  # logits may be computed for the last positions only
    return torch.arange(first, first + n_pos)


def selected(at: At, scope: Scope, call: Call | None, n_rows: int, n_pos: int) -> Bool[Tensor, "batch pos"]:
    """The mask of what is meant, over the columns of this forward."""
    where = columns(call, n_pos)
    prompt = call.prompt if call and call.prompt is not None else int(where[-1]) + 1
    chosen = _at(at, where, call, n_rows, prompt)
    if scope == "prompt":
        chosen = chosen & (where < prompt)
    elif scope == "new":
        chosen = chosen & (where >= prompt)
    return chosen


def _at(at: At, where: Tensor, call: Call | None, n_rows: int, prompt: int) -> Tensor:
    every = torch.ones(n_rows, len(where), dtype=torch.bool)
    if at is None:
        return every
    if isinstance(at, Last):
        at = last_real(call, n_rows, prompt)
    if isinstance(at, Tensor) and at.dtype == torch.bool and at.ndim:
        return _masked(at, where, n_rows, prompt)
    if isinstance(at, Tensor) and at.ndim == 1 and not at.is_floating_point():
        if len(at) != n_rows:
            raise InterpError(f"at has {len(at)} positions, one per row, but the input has {n_rows} rows")
        return where[None] == _wrap(at.cpu(), prompt)[:, None]
    return every & torch.isin(where, _wrap(torch.tensor(_whole_numbers(at), dtype=torch.long), prompt))


def _whole_numbers(at: object) -> list[int]:
    """A position or a list of them; a bool or a float is no position, and an array does not say what its axis is."""
    listed: list[object] = list(at) if isinstance(at, Sequence) else [at]  # pyright: ignore[reportUnknownArgumentType]
    try:
        if any(isinstance(item, bool) or getattr(item, "dtype", None) == torch.bool for item in listed):
            raise TypeError
        return [index(item) for item in listed]  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError) as error:
        raise InterpError(
            f"positions {at!r} are no positions; give an int, a list of ints, an integer tensor (batch,), a bool "
            "tensor (batch, pos), or last"
        ) from error


def _masked(at: Tensor, where: Tensor, n_rows: int, prompt: int) -> Tensor:
    if at.ndim != 2 or at.shape[0] not in (1, n_rows) or at.shape[1] != prompt:
        raise InterpError(f"the mask has shape {tuple(at.shape)}, expected (batch, pos) = ({n_rows}, {prompt})")
    inside = at.cpu()[:, where.clamp_max(prompt - 1)] & (where < prompt)
    return inside.expand(n_rows, -1)


def _wrap(positions: Tensor, n: int) -> Tensor:
    if len(positions) and (int(positions.max()) >= n or int(positions.min()) < -n):
        raise InterpError(f"position {positions.tolist()} is outside the input, which has positions 0 to {n - 1}")
    return torch.where(positions < 0, positions + n, positions)


def last_real(call: Call | None, n_rows: int, prompt: int) -> Int[Tensor, " batch"]:
    """Column of each row's last real prompt token."""
    if call is None or call.mask is None:
        return torch.full((n_rows,), prompt - 1)
    mask = call.mask[:, :prompt].cpu().long()
    return (mask * torch.arange(1, mask.shape[1] + 1)).argmax(dim=1)


def has_heads(site: Site) -> bool:
    """Whether the site has an axis that counts heads."""
    return bool({"head", "kv_head"} & set(site.info.axes))


def chosen_numbers(name: str, given: object, *, none: bool = False) -> list[int]:
    """Heads, dims or experts as a list. A bool or a float names none; an empty list is allowed with `none`."""
    try:
        listed: list[object] = list(given) if isinstance(given, Iterable) else [given]  # pyright: ignore[reportUnknownArgumentType]
        if not (listed or none) or any(
            isinstance(item, bool) or getattr(item, "dtype", None) == torch.bool for item in listed
        ):
            raise TypeError
        return [index(item) for item in listed]  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError) as error:
        raise InterpError(f"{name}={given!r} names no {name}; give an int or a list of ints") from error


def chosen_heads(model: LoadedModel, sites: list[Site], heads: int | Sequence[int] | None) -> list[int] | None:
    """The heads asked for, checked against the sites that have any."""
    if heads is None:
        return None
    listed = chosen_numbers("heads", heads)
    for site in filter(has_heads, sites):
        size = model.dims.size("kv_head" if "kv_head" in site.info.axes else "head") or 0
        if any(not 0 <= head < size for head in listed):
            raise InterpError(f"{site} has heads 0 to {size - 1}, asked for {listed}")
    if not any(map(has_heads, sites)):
        raise InterpError(f"heads={listed} was given, but no site asked for has a head axis (z, q, k, v, pattern)")
    return listed
