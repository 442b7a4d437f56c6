"""Readers and writers: from what a module returns to what a site means, and back.

A raw value is what a hook sees: a tensor, or a tuple, dict or dataclass of which one tensor is meant, or the arguments
of a call. `read` gives the site's view of it; `write` puts a new view into a copy. Writing back what was read changes
no bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from interp.core.errors import InterpError, SiteError
from interp.models.family import Chunk, Reach


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frame:
    """What a view depends on besides the value: the module, the site's reach, and sizes of this forward."""

    module: nn.Module
    reach: Reach
    n_heads: int | None = None
    """Into how many heads the last axis is split."""
    n_rows: int | None = None
    """Sequences in the batch, for values that hold all tokens in one axis."""
    n_pos: int | None = None
    """Positions of this forward, for values that hold those before as well."""


class Arguments(tuple[tuple[Any, ...], dict[str, Any]]):
    """The arguments of a call as one raw value: (args, kwargs)."""

    __slots__ = ()


def read(frame: Frame, value: Any) -> tuple[Tensor, Tensor]:
    """The site's view of a raw value, and the tensor it is a view of; they share memory unless a view says else."""
    reach = frame.reach
    if reach.whole and reach.view:
        whole = reach.view.read(frame.module, value)
        whole = _batched(frame, whole)
        return whole, whole
    raw = select(reach, value)
    return view_of(frame, raw), raw


def view_of(frame: Frame, raw: Tensor) -> Tensor:
    """The site's view of the tensor that holds it; linear, so that it serves for gradients as well."""
    reach = frame.reach
    if reach.whole:
        return raw
    x = _batched(frame, raw)
    if reach.view:
        x = reach.view.read(frame.module, x)
    if reach.recent and frame.n_pos is not None:
        x = x[:, -frame.n_pos :]
    if reach.chunk and not reach.within_heads:
        x = pieces(reach.chunk, x)[reach.chunk[0]]
    if reach.head_major:
        return x.transpose(1, 2)
    if frame.n_heads:
        x = x.unflatten(-1, (frame.n_heads, x.shape[-1] // frame.n_heads))
    return pieces(reach.chunk, x)[reach.chunk[0]] if reach.chunk and reach.within_heads else x


def pieces(chunk: Chunk, x: Tensor) -> Sequence[Tensor]:
    """The last axis in chunks; sizes must be numbers by now."""
    shares = chunk[1]
    if isinstance(shares, int):
        return x.chunk(shares, dim=-1)
    numbers = [int(share) for share in shares]
    unit = x.shape[-1] // sum(numbers)
    return x.split([unit * number for number in numbers], dim=-1)


def write(frame: Frame, value: Any, new: Tensor) -> Any:
    """The raw value with the site's view replaced; the value itself is not touched."""
    reach = frame.reach
    if reach.whole and reach.view:
        return reach.view.write(frame.module, value, new.flatten(0, 1) if reach.flat and new.ndim > 1 else new)
    raw = select(reach, value)
    return _insert(reach, value, _written(frame, raw, new))


def replaced(frame: Frame, value: Any, raw: Tensor) -> tuple[Any, Tensor]:
    """The raw value with another tensor for the one that is meant, and that tensor."""
    return _insert(frame.reach, value, raw), raw


def _written(frame: Frame, raw: Tensor, new: Tensor) -> Tensor:
    reach, x = frame.reach, _batched(frame, raw)
    if reach.chunk and reach.within_heads and frame.n_heads:
        heads = x.unflatten(-1, (frame.n_heads, x.shape[-1] // frame.n_heads))
        new = _with_piece(reach.chunk, heads, new)
    if reach.head_major:
        new = new.transpose(1, 2)
    elif frame.n_heads:
        new = new.flatten(-2)
    if reach.chunk and not reach.within_heads:
        new = _with_piece(reach.chunk, reach.view.read(frame.module, x) if reach.view else x, new)
    if reach.view:
        new = reach.view.write(frame.module, x, new)
    return new.reshape(raw.shape) if reach.flat else new


def _with_piece(chunk: Chunk, x: Tensor, new: Tensor) -> Tensor:
    parts = list(pieces(chunk, x))
    parts[chunk[0]] = new
    return torch.cat(parts, dim=-1)


def _batched(frame: Frame, x: Tensor) -> Tensor:
    """Tokens of all sequences in one axis become (batch, pos)."""
    if not frame.reach.flat or frame.n_rows is None:
        return x
    x = x.unflatten(0, (frame.n_rows, x.shape[0] // frame.n_rows))
    return x.unflatten(1, (-1, frame.reach.folded)) if isinstance(frame.reach.folded, int) else x


def select(reach: Reach, value: Any) -> Tensor:
    """The tensor that is meant: an argument or entry by name or number, or the first one there is."""
    if isinstance(value, Tensor):
        return value
    found = _argument(reach, value) if isinstance(value, Arguments) else _entry(reach, value)
    if not isinstance(found, Tensor):
        raise SiteError(
            f"{reach.path} {'takes' if isinstance(value, Arguments) else 'returns'} {type(found).__name__} where a "
            "tensor is meant; name a module inside it"
        )
    return found


def _entry(reach: Reach, value: Any) -> Any:
    items = _items(value)
    if reach.item is not None:
        return value[reach.item] if isinstance(value, Mapping) or isinstance(reach.item, int) else None
    return next((item for item in items if isinstance(item, Tensor)), value)


def _argument(reach: Reach, value: Arguments) -> Any:
    key = _argument_key(reach, value)
    args, kwargs = value
    return args[key] if isinstance(key, int) else kwargs.get(key)


def _argument_key(reach: Reach, value: Arguments) -> int | str:
    """Which argument: the one asked for, else the first, else the first keyword that holds a tensor."""
    args, kwargs = value
    if isinstance(reach.item, str):
        return reach.item
    wanted = reach.item or 0
    if wanted < len(args):
        return wanted
    tensors = [key for key, item in kwargs.items() if isinstance(item, Tensor)]
    if wanted - len(args) < len(tensors):
        return tensors[wanted - len(args)]
    raise SiteError(f"{reach.path} is called without the tensor argument number {wanted} that this site reads")


def _insert(reach: Reach, value: Any, new: Tensor) -> Any:
    """A copy of the raw value with the meant tensor replaced."""
    if isinstance(value, Tensor):
        return new
    if isinstance(value, Arguments):
        key, (args, kwargs) = _argument_key(reach, value), value
        if isinstance(key, int):
            return Arguments(((*args[:key], new, *args[key + 1 :]), kwargs))
        return Arguments((args, {**kwargs, key: new}))
    if isinstance(value, Mapping):
        items = dict(cast("Mapping[str, Any]", value))
        key = reach.item if reach.item is not None else _first(list(items.items()))
        items[cast(str, key)] = new
        kind = cast("type[Any]", type(value))
        return kind(**items) if dataclasses.is_dataclass(kind) else kind(items)
    if dataclasses.is_dataclass(value):
        name = _first([(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)])
        return dataclasses.replace(cast(Any, value), **{name: new})
    sequence = list(cast("tuple[Any, ...]", value))
    sequence[reach.item if isinstance(reach.item, int) else _first(list(enumerate(sequence)))] = new
    kind = cast("type[Any]", type(value))
    return kind(*sequence) if hasattr(kind, "_fields") else kind(sequence)


def _first(items: list[tuple[Any, Any]]) -> Any:
    return next(key for key, item in items if isinstance(item, Tensor))


def _items(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(cast(Mapping[str, Any], value).values())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, f.name) for f in dataclasses.fields(value)]
    return list(cast("tuple[Any, ...]", value)) if isinstance(value, tuple | list) else []


def check_same(site: str, old: Tensor, new: Tensor) -> Tensor:
    """An edit must keep shape, dtype and device."""
    if new.shape != old.shape or new.dtype != old.dtype or new.device != old.device:
        raise InterpError(
            f"the edit of {site} turned {old.dtype} {tuple(old.shape)} on {old.device} into "
            f"{new.dtype} {tuple(new.shape)} on {new.device}; keep shape, dtype and device"
        )
    return new
