"""Readers and writers: from what a module returns to what a site means, and back.

`read` gives the site's view of a raw value; `write` puts a new view into a copy. Writing back what was read changes
no bit. Raw values may be a tensor, or a tuple, dict or dataclass whose first tensor is meant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from interp.core.errors import InterpError, SiteError
from interp.models.table import Reach


def first_tensor(value: Any, path: str) -> Tensor:
    """The tensor a module's output is about: itself, or the first one inside."""
    if isinstance(value, Tensor):
        return value
    for item in _items(value):
        if isinstance(item, Tensor):
            return item
    raise SiteError(f"{path} returns {type(value).__name__} without a tensor; name a module inside it")


def replace_first(value: Any, new: Tensor) -> Any:
    """A copy of the output with its first tensor replaced."""
    if isinstance(value, Tensor):
        return new
    if isinstance(value, Mapping):
        items = dict(cast("Mapping[str, Any]", value))
        items[next(key for key, item in items.items() if isinstance(item, Tensor))] = new
        kind = cast("type[Any]", type(value))
        return kind(**items) if dataclasses.is_dataclass(kind) else kind(items)
    if dataclasses.is_dataclass(value):
        name = next(f.name for f in dataclasses.fields(value) if isinstance(getattr(value, f.name), Tensor))
        return dataclasses.replace(cast(Any, value), **{name: new})
    sequence = list(cast("tuple[Any, ...]", value))
    sequence[next(i for i, item in enumerate(sequence) if isinstance(item, Tensor))] = new
    kind = cast("type[Any]", type(value))
    return kind(*sequence) if hasattr(kind, "_fields") else kind(sequence)


def _items(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(cast(Mapping[str, Any], value).values())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, f.name) for f in dataclasses.fields(value)]
    return list(cast("tuple[Any, ...]", value)) if isinstance(value, tuple | list) else []


def read(reach: Reach, raw: Tensor, n_heads: int | None) -> Tensor:
    """The site's view of a raw tensor; shares memory with it."""
    view = raw.chunk(reach.chunk[1], dim=-1)[reach.chunk[0]] if reach.chunk else raw
    if reach.head_major:
        return view.transpose(1, 2)
    return view.unflatten(-1, (n_heads, view.shape[-1] // n_heads)) if n_heads else view


def write(reach: Reach, raw: Tensor, new: Tensor, n_heads: int | None) -> Tensor:
    """The raw tensor with the site's view replaced; `raw` itself is not touched."""
    if reach.head_major:
        new = new.transpose(1, 2)
    elif n_heads:
        new = new.flatten(-2)
    if not reach.chunk:
        return new
    chunks = list(raw.chunk(reach.chunk[1], dim=-1))
    chunks[reach.chunk[0]] = new
    return torch.cat(chunks, dim=-1)


def check_same(site: str, old: Tensor, new: Tensor) -> Tensor:
    """An edit must keep shape, dtype and device."""
    if new.shape != old.shape:
        raise InterpError(f"the edit of {site} turned shape {tuple(old.shape)} into {tuple(new.shape)}; keep the shape")
    if new.dtype != old.dtype or new.device != old.device:
        raise InterpError(
            f"the edit of {site} turned {old.dtype} on {old.device} into {new.dtype} on {new.device}; keep both"
        )
    return new
