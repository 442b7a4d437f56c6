"""Readers and writers of attention scores and patterns, which are recomputed beside the model's own attention.

Without edits the model's output stays and only what is read is recomputed, or handed out as a recipe (`Later`) for when
somebody looks. An edit changes the output of the queries whose pattern it moved. With gradients the output keeps its
bits and gets the graph of `pattern @ values`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from interp.core.sites import Part
from interp.models.attention import AttentionCall, Later
from interp.models.replays import Watcher, into_graph
from interp.models.views import check_same


def attended(
    call: AttentionCall,
    output: Tensor,
    writers: Sequence[Watcher],
    readers: Sequence[Watcher],
    n_gone: int,
    past: int | None,
    *,
    grad: bool,
) -> Tensor:
    """Serve who reads and writes; the output to go on with. `n_gone` and `past` are those of `AttentionCall.scores`."""
    if writers or grad:
        return _again(call, output, writers, readers, n_gone, past, grad=grad)
    made: dict[tuple[int, ...] | None, Tensor] = {}
    for entry in list(readers):
        if entry.later is not None:
            entry.later(Later(call, entry.site.part, entry.heads, n_gone, past))
            continue
        key = None if entry.heads is None else tuple(entry.heads)
        if key not in made:
            made[key] = call.scores(entry.heads, n_gone, past)
        value = made[key] if entry.site.part is Part.ATTN_SCORES else call.pattern(made[key], entry.heads)
        entry.act(value, value)
    return output


def _again(
    call: AttentionCall,
    output: Tensor,
    writers: Sequence[Watcher],
    readers: Sequence[Watcher],
    n_gone: int,
    past: int | None,
    *,
    grad: bool,
) -> Tensor:
    """Edits of scores and pattern take effect; with gradients, the output depends on them."""
    plain_scores = call.scores(None, n_gone, past)
    scores = _rewritten(writers, Part.ATTN_SCORES, plain_scores)
    masked = plain_scores == torch.finfo(scores.dtype).min  # what is masked stays so, whatever an edit says
    if scores is not plain_scores:
        scores = torch.where(masked, plain_scores, scores)
    _show(readers, Part.ATTN_SCORES, scores)
    plain = call.pattern(plain_scores)
    unedited = plain if scores is plain_scores else call.pattern(scores)
    pattern = _rewritten(writers, Part.PATTERN, unedited)
    if pattern is not unedited:
        pattern = torch.where(masked, unedited, pattern)
    _show(readers, Part.PATTERN, pattern)
    again = call.outputs(pattern[..., n_gone:])
    if grad:
        output = output.detach() + (again - again.detach())
    moved = (pattern != plain).any(dim=3).transpose(1, 2)
    return torch.where(moved[..., None], again, output) if bool(moved.any()) else output


def _rewritten(writers: Sequence[Watcher], part: Part, value: Tensor) -> Tensor:
    for entry in writers:
        if entry.site.part is part:
            value = check_same(str(entry.site), value, entry.act(value))
    return value


def _show(readers: Sequence[Watcher], part: Part, value: Tensor) -> None:
    for entry in [entry for entry in readers if entry.site.part is part]:
        if entry.grad:
            into_graph(value)
        entry.act(value if entry.heads is None else value[:, list(entry.heads)], value)
