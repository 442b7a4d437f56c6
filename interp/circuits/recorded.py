"""How a model calls its attention: recorded in one native forward, to call it again on other rows.

A row belongs to a prompt of the recorded forward and gets that prompt's masks and rotary embeddings. With `start`, the
forward covers the positions from there on; keys and values of those before are kept and handed out as a cache would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.instrument.capture import capture
from interp.models.model import LoadedModel


class Prefix:
    """Stands in for a key-value cache: hands out what stands before `start`, and keeps nothing."""

    def __init__(self, held: tuple[Tensor, Tensor], rows: Tensor) -> None:
        self.held, self.rows = held, rows

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, values = (x.index_select(0, self.rows) for x in self.held)
        return torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)

    def get_seq_length(self, *_: Any) -> int:
        return int(self.held[0].shape[2])


@dataclass(kw_only=True, eq=False)
class Calls:
    """One call of attention for each layer, and what the forward began and ended with."""

    n_prompts: int
    made: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict[int, Any])
    before: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict[int, Any])
    embedding: Float[Tensor, "batch pos d_model"] = field(default_factory=lambda: torch.empty(0, 0, 0))
    logits: Float[Tensor, "batch 1 vocab"] = field(default_factory=lambda: torch.empty(0, 1, 0))

    def note(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.made[layer] = args, dict(kwargs)
        cache = next((value for value in (*args, *kwargs.values()) if hasattr(value, "get_seq_length")), None)
        if cache is not None:  # before this call adds its own keys and values
            self.before[layer] = cache.layers[layer].keys, cache.layers[layer].values

    def arguments(
        self, layer: int, stream: Tensor, rows: Int[Tensor, " row"]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call of a layer with another input, for rows of these prompts."""
        args, kwargs = self.made[layer]
        placed = [self._place(layer, value, rows) for value in args]
        named = {name: self._place(layer, value, rows) for name, value in kwargs.items() if name != "hidden_states"}
        if "hidden_states" in kwargs:
            return tuple(placed), {**named, "hidden_states": stream}
        return (stream, *placed[1:]), named

    def _place(self, layer: int, value: Any, rows: Tensor) -> Any:
        if hasattr(value, "get_seq_length"):
            return Prefix(self.before[layer], rows)
        if isinstance(value, tuple):
            return tuple(self._place(layer, item, rows) for item in cast("tuple[Any, ...]", value))
        if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == self.n_prompts > 1:
            return value.index_select(0, rows)
        return value


def recorded(model: LoadedModel, tokens: Int[Tensor, "batch pos"], attention: Sequence[str], start: int) -> Calls:
    """Run the prompts once and note how the modules at these paths, one a layer, are called."""
    module, cache, calls = cast(Any, model.module), None, Calls(n_prompts=len(tokens))
    with torch.no_grad():
        if start:
            cache = module(input_ids=tokens[:, :start], use_cache=True, logits_to_keep=1).past_key_values
        hooks = [
            model.table.at(path).register_forward_pre_hook(
                lambda _m, args, kwargs, layer=layer: calls.note(layer, args, kwargs), with_kwargs=True
            )
            for layer, path in enumerate(attention)
        ]
        past = {"use_cache": False} if cache is None else {"past_key_values": cache, "use_cache": True}
        try:
            with capture(model, "resid_pre.0", stop=False) as acts:
                out = module(input_ids=tokens[:, start:], logits_to_keep=1, **past)
        finally:
            for hook in hooks:
                hook.remove()
    calls.embedding, calls.logits = acts["resid_pre.0"], out.logits
    return calls
