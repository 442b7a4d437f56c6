"""Running single blocks of the untouched model on residual streams of one's own.

    runner = BlockRunner(model, tokens, start=9)
    resid = runner.block(12, resid, rows)      # (row, pos, d_model) through block 12
    logits = runner.head(resid[:, -1:])

A base run records with which arguments the model calls each block (masks, rotary embeddings); a block is then the
model's own module, called with these and any number of rows, each of which belongs to a prompt of the base run. With
`start`, the positions before it are taken as given: their keys and values come from a cache of the base run, and only
the rest is computed. The result equals the full forward up to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.core.errors import InterpError
from interp.core.sites import Part, Site
from interp.instrument.capture import Activations, capture
from interp.models.calls import Call
from interp.models.model import LoadedModel


class _Prefix:
    """Stands in for a key-value cache: hands out the prefix's keys and values, and keeps nothing."""

    def __init__(self, cache: Any, rows: Tensor) -> None:
        self.cache, self.rows = cache, rows

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        before = self.cache.layers[layer]
        keys, values = before.keys.index_select(0, self.rows), before.values.index_select(0, self.rows)
        return torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)

    def get_seq_length(self, *_: Any) -> int:
        return int(self.cache.get_seq_length())


class BlockRunner:
    """The blocks of one model, ready to run on rows that belong to the prompts of a base run."""

    def __init__(
        self,
        model: LoadedModel,
        tokens: Int[Tensor, "batch pos"],
        *,
        start: int = 0,
        sites: Sequence[str] = ("resid_pre.*", "resid_post.*"),
        prefix: Any = None,
    ) -> None:
        """prefix: a key-value cache of these prompts that holds at least `start` positions; computed if not given."""
        if not model.is_transformers:
            raise InterpError(
                f"{model.source} is not a transformers causal language model; its blocks cannot be run alone"
            )
        if not 0 <= start < tokens.shape[1]:
            raise InterpError(f"start={start} is outside the prompt, which has positions 0 to {tokens.shape[1] - 1}")
        self.model, self.start, self.n_prompts = model, start, tokens.shape[0]
        self.layers, self.tokens = model.layers, tokens
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [((), {})] * len(self.layers)
        self._prefix = self._run_prefix(tokens[:, :start], prefix) if start else None
        self.base: Activations = self._run_base(tokens[:, start:], sites)
        """Activations of the base run at `sites`, positions from `start` on."""

    def later(self, start: int) -> BlockRunner:
        """The same prompts with more positions taken as given, whose keys and values this run has computed."""
        if start == self.start:
            return self
        return BlockRunner(self.model, self.tokens, start=start, sites=("resid_pre.0",), prefix=self._cache)

    def _run_prefix(self, tokens: Tensor, known: Any) -> Any:
        if known is not None and all(type(layer).__name__ == "DynamicLayer" for layer in known.layers):
            return _cut(known, tokens.shape[1])  # other kinds, such as sliding windows, may have dropped positions
        with torch.no_grad():
            return cast(Any, self.model.module)(input_ids=tokens.to(self.model.device), use_cache=True).past_key_values

    def _run_base(self, tokens: Tensor, sites: Sequence[str]) -> Activations:
        self._cache = None if self._prefix is None else _cut(self._prefix)
        handles = [
            layer.register_forward_pre_hook(
                lambda _m, args, kwargs, i=i: self._calls.__setitem__(i, (args[1:], kwargs)), with_kwargs=True
            )
            for i, layer in enumerate(self.layers)
        ]
        try:
            with torch.no_grad(), capture(self.model, sites, stop=False) as acts:
                past = {} if self._cache is None else {"past_key_values": self._cache}
                out = cast(Any, self.model.module)(input_ids=tokens.to(self.model.device), use_cache=True, **past)
        finally:
            for handle in handles:
                handle.remove()
        self.logits: Float[Tensor, "batch pos vocab"] = out.logits
        self._cache = out.past_key_values
        return acts

    def block(
        self, layer: int, resid: Float[Tensor, "row pos d_model"], rows: Int[Tensor, " row"], *, grad: bool = False
    ) -> Float[Tensor, "row pos d_model"]:
        """The stream after block `layer`; `rows[i]` is the prompt that row i belongs to. grad: keep the graph."""
        args, kwargs = self._calls[layer]
        kwargs = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        placed = [self._place(value, rows) for value in args]
        named = {name: self._place(value, rows) for name, value in kwargs.items()}
        with torch.set_grad_enabled(grad), self.model.hub.within(self._call(len(rows), resid.shape[1])):
            out = self.layers[layer](resid, *placed, **named)
        return out[0] if isinstance(out, tuple) else out

    def _call(self, n_rows: int, n_pos: int) -> Call:
        """What edits and captures inside a block may know: positions are those of the whole prompt."""
        return Call(n_rows=n_rows, n_pos=n_pos, past=self.start, mask=None, prompt=None)

    def _place(self, value: Any, rows: Tensor) -> Any:
        """An argument of the base run, for other rows."""
        if hasattr(value, "get_seq_length"):
            return None if self._prefix is None else _Prefix(self._prefix, rows)
        if isinstance(value, tuple):
            return tuple(self._place(item, rows) for item in cast("tuple[Any, ...]", value))
        if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == self.n_prompts > 1:
            return value.index_select(0, rows)
        return value

    def head(self, resid: Float[Tensor, "row pos d_model"], *, grad: bool = False) -> Float[Tensor, "row pos vocab"]:
        """Logits of a stream that has left the last block: final norm, unembedding, soft-capping if there is any."""
        with torch.set_grad_enabled(grad):
            logits = self._module(Part.LOGITS)(self._module(Part.FINAL_NORM)(resid))
            cap = getattr(getattr(self.model.module, "config", None), "final_logit_softcapping", None)
            return logits if cap is None else cast(Tensor, torch.tanh(logits / cap) * cap)

    def _module(self, part: Part) -> nn.Module:
        return self.model.module.get_submodule(self.model.table.reach(Site(part)).path)


def _cut(cache: Any, n_pos: int | None = None) -> Any:
    """A cache of the first positions (of all, if not said) that can be extended without touching the original."""
    made = copy.copy(cache)
    made.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in made.layers if n_pos is not None else ():
        layer.keys, layer.values = layer.keys[:, :, :n_pos], layer.values[:, :, :n_pos]
    return made
