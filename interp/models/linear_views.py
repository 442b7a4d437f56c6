"""Views that the tables of linear recurrences share: where time is, and what one step of decoding looks like.

Modules that keep a state run other code when they get one position and a state: there the time axis is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from interp.core.sites import Part
from interp.models.family import Rule, View


def time_third(n_axes: int) -> View:
    """(batch, d, pos, ...) of a whole forward, or (batch, d, ...) of one step, as (batch, pos, d, ...)."""

    def read(_module: nn.Module, x: Tensor) -> Tensor:
        return x.unsqueeze(1) if x.ndim == n_axes - 1 else x.transpose(1, 2)

    def write(_module: nn.Module, x: Tensor, new: Tensor) -> Tensor:
        return new.squeeze(1) if x.ndim == n_axes - 1 else new.transpose(1, 2)

    return View(read=read, write=write)


CHANNELS_FIRST = time_third(3)
STATES_FIRST = time_third(4)


def _added(_layer: Any, stream: Tensor, added: Tensor) -> Tensor:
    return stream + added


STREAM_RULE = Rule(
    text="resid_pre + attn_out == resid_post",
    result=Part.RESID_POST,
    inputs=(Part.RESID_PRE, Part.ATTN_OUT),
    function=_added,
)
"""Of blocks without an MLP."""


def piece(sizes: Callable[[Any], Sequence[int]], number: int, head: Callable[[Any], int] | None = None) -> View:
    """One piece of the last axis, cut into sizes that the module knows; `head` cuts it into heads of that width."""

    def read(module: nn.Module, x: Tensor) -> Tensor:
        found = x.split(list(sizes(module)), dim=-1)[number]
        return found.unflatten(-1, (-1, head(module))) if head else found

    def write(module: nn.Module, x: Tensor, new: Tensor) -> Tensor:
        pieces = list(x.split(list(sizes(module)), dim=-1))
        pieces[number] = new.flatten(-2) if head else new
        return torch.cat(pieces, dim=-1)

    return View(read=read, write=write)


def _read_step(module: Any, x: Tensor) -> Tensor:
    """(batch, head, d_head), the same for each of a head's channels, or (batch, 1, head)."""
    return x if x.shape[1] == 1 and x.shape[2] == module.num_heads else x[..., 0].unsqueeze(1)


def _write_step(module: Any, x: Tensor, new: Tensor) -> Tensor:
    new = new.clamp(*module.time_step_limit)  # as the scan of a whole forward does, and decoding does not
    return _write_step_pre(module, x, new)


def _write_step_pre(_module: Any, x: Tensor, new: Tensor) -> Tensor:
    return new if new.shape == x.shape else new.squeeze(1).unsqueeze(-1).expand_as(x)


STEP_PER_HEAD = View(read=_read_step, write=_write_step)
"""Mamba-2's step size in a forward of one position."""
STEP_PRE_PER_HEAD = View(read=_read_step, write=_write_step_pre)
