"""How many patched runs fit into memory at once (part of `patching`).

A row in flight holds, per position, a few copies of the residual stream, the MLP's hidden vectors, queries, keys,
values and head outputs, and the attention scores of every head over all keys; then, one block at a time, whatever is
computed next. `tokens` rows x positions are computed together: as many as `SHARE` of the free memory holds, and no
more than pays (beyond some thousand tokens a matrix product on a processor gains nothing).
Beware: free memory is that of this moment; other programs may take it.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import psutil
import torch

from interp.core.errors import InterpError
from interp.instrument.plan import size_text
from interp.models.model import LoadedModel

SHARE = 0.25
"""Of the free memory: intermediate results of a block come on top of what is counted here."""
ENOUGH = {"cpu": 2048}
"""Tokens per pass beyond which nothing is gained, by type of device; others take ENOUGH_ELSEWHERE."""
ENOUGH_ELSEWHERE = 65_536
ENOUGH_LOGITS = 128
"""Rows whose logits are worth computing together."""


_limit: ContextVar[int | None] = ContextVar("patching_tokens", default=None)


@contextmanager
def at_most(tokens: int | None) -> Generator[None, None, None]:
    """Compute at most so many tokens together in everything run inside; results do not depend on it."""
    if tokens is not None and tokens < 1:
        raise InterpError(f"{tokens} tokens at a time are none; give at least the length of a prompt")
    before = _limit.set(tokens)
    try:
        yield
    finally:
        _limit.reset(before)


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """How the rows of a sweep are split."""

    tokens: int
    """Rows x positions computed together."""
    logit_rows: int
    """Rows whose logits are held at once."""
    bytes_per_token: int
    memory_free: int


def plan_sweep(model: LoadedModel, n_pos: int, n_last: int = 1, *, memory_free: int | None = None) -> SweepPlan:
    """Sizes for prompts of `n_pos` tokens, scored at the last `n_last`. Raises InterpError if one row does not fit."""
    free = free_memory(model.device) if memory_free is None else memory_free
    per_token, per_logits = _bytes(model, n_pos), 4 * n_last * 4 * (model.dims.d_vocab or 0) or 1
    fits = int(SHARE * free / per_token)
    if fits < n_pos or SHARE * free < per_logits:
        need = max(per_token * n_pos, per_logits) / SHARE
        raise InterpError(
            f"one patched run of {n_pos} tokens needs about {size_text(need)} and {size_text(free)} are free; "
            "shorten the prompts, use a smaller dtype, or close other programs"
        )
    enough = ENOUGH.get(model.device.type, ENOUGH_ELSEWHERE)
    return SweepPlan(
        tokens=min(fits, _limit.get() or enough),
        logit_rows=max(1, min(int(SHARE * free / per_logits), ENOUGH_LOGITS * (enough // ENOUGH["cpu"]))),
        bytes_per_token=per_token,
        memory_free=free,
    )


def graph_rows(model: LoadedModel, n_pos: int) -> int:
    """Prompts whose gradients are taken together: until the backward pass everything is kept, in every layer."""
    vocab = 3 * 4 * (model.dims.d_vocab or 0)
    per_row = n_pos * (model.n_layers * _bytes(model, n_pos) + vocab)
    fits = int(SHARE * free_memory(model.device) / per_row)
    return max(1, min(fits, (_limit.get() or fits * n_pos) // n_pos))


def _bytes(model: LoadedModel, n_pos: int) -> int:
    """Per row and position."""
    d = model.dims
    heads, kv, d_head = d.n_heads or 1, d.n_kv_heads or d.n_heads or 1, d.d_head or 0
    d_mlp = d.d_mlp or 4 * (d.d_model or 0)
    floats = 6 * (d.d_model or 0) + 3 * d_mlp + 2 * (heads + 2 * kv) * d_head + 2 * heads * n_pos
    return floats * max(model.dtype.itemsize, 4)


def free_memory(device: torch.device) -> int:
    """Bytes to be had on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
