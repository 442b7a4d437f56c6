"""The forward call that is running: how many positions it computes, and how many came before.

Models say how far they are in many ways: key-value caches count, state-space caches hold one state and do not. So
while `LoadedModel.generate` runs, positions are counted here: a call that brings more positions than were seen starts
over (no cache), any other goes on behind them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Call:
    """One forward call of the whole model."""

    n_rows: int
    n_pos: int
    past: int
    """Positions already in the cache."""
    mask: Tensor | None
    """Bool (batch, past + pos): True where there is a real token; `None` where all are."""
    prompt: int | None
    """Length of the prompt while generating, else `None`."""
    generation: int = 0
    """Which generation of this model it belongs to."""


def call_of(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], prompt: int | None, generation: int, seen: int
) -> Call | None:
    """The call these arguments make; `None` if they hold no sequence of tokens or vectors."""
    tokens = next(
        (x for x in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]) if isinstance(x, Tensor)), None
    )
    if tokens is None or tokens.ndim not in (2, 3):
        return None
    n_pos = tokens.shape[1]
    counted = getattr(kwargs.get("past_key_values"), "get_seq_length", None)
    if prompt is not None:
        past = 0 if n_pos > seen else seen
    else:
        past = int(counted()) if counted is not None else 0
    mask = kwargs.get("attention_mask")
    mask = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
    return Call(n_rows=tokens.shape[0], n_pos=n_pos, past=past, mask=mask, prompt=prompt, generation=generation)
