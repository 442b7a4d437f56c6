"""Attention scores and patterns, recomputed beside the model's own attention.

Transformers models call an attention function with (module, query, key, value, mask, ...). While a tap is on, that
function is wrapped: the very same function still computes the output, so no number changes, and the tap sees the
arguments. From these the scores and the pattern are recomputed for the heads asked for. Only if an edit changed a
head's scores or pattern is that head's output replaced by `pattern @ values`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interp.core.errors import SiteError
from interp.core.sites import Part


@dataclass(frozen=True)
class AttentionCall:
    """What a module handed to its attention function. Rows of `key` and `value` are kv heads."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None
    causal: bool
    sinks: Tensor | None = None
    """A score per head that takes part in the softmax and belongs to no key (gpt-oss)."""

    def scores(self, heads: Sequence[int] | None = None, n_gone: int = 0, past: int | None = None) -> Tensor:
        """Masked scores (batch, head, query, key); masked entries hold the dtype's lowest value.

        A sliding-window cache drops its oldest keys: `n_gone` columns are put back, masked, so that column j is
        position j. `past` positions come before the queries; a static cache has unused keys after them.
        """
        scores = self._scores(heads, None if past is None else past - n_gone)
        return torch.nn.functional.pad(scores, (n_gone, 0), value=torch.finfo(scores.dtype).min) if n_gone else scores

    def _scores(self, heads: Sequence[int] | None, before: int | None) -> Tensor:
        group = self.query.shape[1] // self.key.shape[1]
        chosen = list(range(self.query.shape[1])) if heads is None else list(heads)
        query, key = self.query[:, chosen], self.key[:, [head // group for head in chosen]]
        scores = query @ key.transpose(2, 3) * self.scaling
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        lowest = torch.finfo(scores.dtype).min
        if self.mask is None:
            if not self.causal:
                return scores
            n_query, n_key = scores.shape[-2:]
            allowed = torch.ones(n_query, n_key, dtype=torch.bool, device=scores.device).tril(
                n_key - n_query if before is None else before
            )
            return scores.masked_fill(~allowed, lowest)
        mask = self.mask[..., : scores.shape[-1]]
        mask = mask if mask.shape[1] == 1 else mask[:, chosen]
        if mask.dtype == torch.bool:
            return scores.masked_fill(~mask, lowest)
        return (scores + mask).clamp_min(lowest)

    def pattern(self, scores: Tensor, heads: Sequence[int] | None = None) -> Tensor:
        """The softmax of scores of these heads; rows sum to 1, less the share of a sink."""
        if self.sinks is None:
            return softmax(scores)
        sinks = self.sinks if heads is None else self.sinks[list(heads)]
        column = sinks.to(scores).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        return softmax(torch.cat([scores, column], dim=-1))[..., :-1]

    def outputs(self, pattern: Tensor) -> Tensor:
        """`pattern @ values` for all heads: (batch, query, head, d_head)."""
        group = self.query.shape[1] // self.key.shape[1]
        return (pattern @ self.value.repeat_interleave(group, dim=1)).transpose(1, 2)


def softmax(scores: Tensor) -> Tensor:
    """Rows of attention weights, computed in float32 at least."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    return torch.softmax(scores, dim=-1, dtype=wide).to(scores.dtype)


@dataclass(frozen=True)
class Later:
    """Scores or a pattern, computed when first asked for: until then only query, key and mask are kept."""

    call: AttentionCall
    part: Part
    heads: Sequence[int] | None
    n_gone: int
    past: int | None

    @property
    def shape(self) -> torch.Size:
        n_rows, n_heads, n_query, _ = self.call.query.shape
        n_heads = n_heads if self.heads is None else len(self.heads)
        return torch.Size((n_rows, n_heads, n_query, self.call.key.shape[2] + self.n_gone))

    @property
    def dtype(self) -> torch.dtype:
        return self.call.query.dtype

    @property
    def needs(self) -> tuple[Tensor, ...]:
        """What is kept until then."""
        return tuple(x for x in (self.call.query, self.call.key, self.call.mask) if x is not None)

    def value(self) -> Tensor:
        with torch.no_grad():
            scores = self.call.scores(self.heads, self.n_gone, self.past)
            return scores if self.part is Part.ATTN_SCORES else self.call.pattern(scores, self.heads)


Tap = Callable[[AttentionCall, Tensor], Tensor]
"""Takes the call and the output (batch, query, head, d_head); returns the output, changed or not."""

_taps: dict[int, list[Tap]] = {}
_originals: dict[str, Any] = {}
_lock = threading.RLock()
_ABSENT = object()


def tap(module: nn.Module, function: Tap) -> Callable[[], None]:
    """Route the attention calls of one module through `function`; returns what undoes it."""
    kind = _implementation(module)
    with _lock:
        _taps.setdefault(id(module), []).append(function)
        if kind not in _originals:
            _install(kind)

    def undo() -> None:
        with _lock:
            _taps[id(module)].remove(function)
            if not _taps[id(module)]:
                del _taps[id(module)]
            if not _taps:
                _uninstall()

    return undo


def _implementation(module: nn.Module) -> str:
    kind = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if not isinstance(kind, str) or not hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS"):
        raise SiteError(
            f"{type(module).__name__} does not call its attention through transformers' attention interface; "
            "scores and patterns cannot be recomputed for it, but q, k, v and z can be captured"
        )
    if kind not in ("sdpa", "eager"):
        raise SiteError(
            f"scores and patterns are recomputed for attention kernels sdpa and eager, this model runs {kind!r}; "
            "load it with one of these, or capture q, k, v and z"
        )
    return kind


def _interface() -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS


def _install(kind: str) -> None:
    interface = _interface()
    original: Any = interface.get(kind, _ABSENT)
    _originals[kind] = original

    def wrapped(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> Any:
        function = original
        if function is _ABSENT:
            function = sys.modules[type(module).__module__].eager_attention_forward
        output, weights = function(module, query, key, value, mask, **kwargs)
        listeners = list(_taps.get(id(module), ()))
        if not listeners:
            return output, weights
        scaling = kwargs.get("scaling")
        causal = kwargs.get("is_causal")
        call = AttentionCall(
            query=query,
            key=key,
            value=value,
            mask=mask,
            scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
            softcap=kwargs.get("softcap"),
            sinks=kwargs.get("s_aux"),
            causal=bool(getattr(module, "is_causal", True) if causal is None else causal),
        )
        for listener in listeners:
            output = listener(call, output)
        return output, weights

    interface[kind] = wrapped


def _uninstall() -> None:
    interface = _interface()
    for kind in list(_originals):
        del interface[kind]
        original = _originals.pop(kind)
        if original is not _ABSENT and interface.get(kind, _ABSENT) is not original:
            interface[kind] = original
