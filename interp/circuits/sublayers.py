"""Attention and MLP of each block, run on streams of one's own: every head may read another stream.

    parts = Sublayers(model, tokens, start=9)
    x = parts.norm("attn", 3, stream)                    # what a destination of layer 3 reads
    z = parts.attention(3, q, k, v, rows)                # the model's own attention, on queries, keys, values given
    out = parts.results(3, z)                            # what each head adds to the stream; their sum is attn_out

The modules are the model's own and are not changed: while one runs, hooks put the given queries, keys and values in
place of what its projections would return, and take head outputs before the output projection. Rotary embedding, norms
of queries and keys, masks, caps and windows are therefore whatever the model does. One native forward records with
which arguments attention is called; with `start`, keys and values of the positions before come from it, and only the
rest is run.

Where a norm stands after the sublayer (Gemma 2 and 3, OLMo 2), a head's share of the normed sum is gain * result / rms
with the rms of the run's own sum: shares add up to what reaches the stream, and change with every head of the layer.
A model that this does not rebuild up to rounding is refused: parallel blocks, scaled residuals, gated attention, ...
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.circuits.recorded import recorded
from interp.core.errors import InterpError
from interp.core.sites import Part, Site
from interp.instrument.capture import capture
from interp.instrument.guards import check_instrumentable
from interp.models.family import OWNER, Weight
from interp.models.model import LoadedModel

Where = Literal["attn", "mlp"]
NORMS = {"attn": Part.ATTN_IN, "mlp": Part.MLP_IN}
_QKV, _HALVES = ("W_Q", "W_K", "W_V"), ("W_gate", "W_up")


class Sublayers:
    """The sublayers of one model, ready for rows that belong to the prompts of a recorded run."""

    def __init__(self, model: LoadedModel, tokens: Int[Tensor, "batch pos"], *, start: int = 0) -> None:
        check_instrumentable(model, grad=True)
        if not model.is_transformers or any(not model.table.has_weight(name, 0) for name in (*_QKV, "W_O")):
            raise InterpError(
                f"{model.source} ({model.table.name}) has no known query, key, value and output projections in "
                "transformers' layout; edge methods need these (for a bridge: load the model it wraps)"
            )
        self.model, self.start, self.n_prompts = model, start, len(tokens)
        self.n_layers, self.has_mlp = model.n_layers, Part.MLP_OUT in {site.part for site in model.table.sites}
        self.n_heads, self.n_kv = cast(int, model.dims.n_heads), cast(int, model.dims.n_kv_heads)
        self._attention = [self._at(Site(Part.Z, layer)).rpartition(".")[0] for layer in range(self.n_layers)]
        if model.weight("W_Q", 0).shape[1] != self.n_heads * model.weight("W_O", 0).shape[1]:
            raise InterpError(f"{model.source} projects more than queries in one matrix (gated attention?)")
        self._calls = recorded(model, tokens.to(model.device), self._attention, start)
        self.embedding: Float[Tensor, "batch pos d_model"] = self._calls.embedding
        """The stream that enters the first block, from `start` on."""
        self.logits: Float[Tensor, "batch 1 vocab"] = self._calls.logits
        """What the model itself returns at the last position."""

    def embed(self, tokens: Int[Tensor, "row pos"]) -> Float[Tensor, "row rest d_model"]:
        """The stream that enters the first block for other tokens, from `start` on."""
        with capture(self.model, "resid_pre.0") as acts:
            self.model(tokens.to(self.model.device))
        return acts["resid_pre.0"][:, self.start :]

    # Reading the stream -------------------------------------------------------------------------------------------

    def norm(
        self, where: Where, layer: int, stream: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch d_model"]:
        """What the sublayer reads; the stream itself where there is no norm before it."""
        reach = self.model.table.reach(Site(NORMS[where], layer))
        return stream if reach.side == "input" else self._module(reach.path)(stream)

    def final(self, stream: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The final norm."""
        return self._module(self._at(Site(Part.FINAL_NORM)))(stream)

    def project(
        self, kind: str, layer: int, read: Float[Tensor, "... d_model"], heads: Sequence[int] | None = None
    ) -> Tensor:
        """Queries, keys or values (`q`, `k`, `v`) of a normed stream: (..., head, d_head). With `heads`, the first axis
        of `read` and of the result is one stream for each of these."""
        name = f"W_{kind.upper()}"
        n = self.n_heads if kind == "q" else self.n_kv
        weight = self.model.weight(name, layer).unflatten(1, (n, -1))
        bias = self.model.table.bias(name, layer)
        if heads is None:
            made = read @ weight.flatten(1)
            return (made if bias is None else made + bias).unflatten(-1, (n, -1))
        chosen = torch.tensor(list(heads), device=read.device)
        made = torch.bmm(read.flatten(1, -2), weight.movedim(1, 0)[chosen]).unflatten(1, read.shape[1:-1])
        if bias is None:
            return made
        return made + bias.unflatten(0, (n, -1))[chosen].view(len(chosen), *[1] * (read.ndim - 2), -1)

    def back(
        self, kind: str, layer: int, grad: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "head batch pos d_model"]:
        """Gradient at the normed stream that each head (or kv group) reads, from that at its projection."""
        weight = self.model.weight(f"W_{kind.upper()}", layer).unflatten(1, (grad.shape[2], -1))
        return torch.einsum("bthe,dhe->hbtd", grad, weight)

    # Sublayers ----------------------------------------------------------------------------------------------------

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rows: Int[Tensor, " row"]) -> Tensor:
        """Head outputs z (row, pos, head, d_head), before the output projection, for projections (row, pos, head or
        group, d_head) before their norms and rotary embedding; `rows[i]` is the prompt that row i belongs to."""
        found: list[Tensor] = []

        def take(_m: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            found.append(args[0])
            return (args[0][:0], *args[1:])

        blank = q.new_zeros(1).expand(*q.shape[:2], self.embedding.shape[-1])
        placed, named = self._calls.arguments(layer, blank, rows)
        out = self._module(self._at(Site(Part.Z, layer)))
        given = dict(zip(_QKV, (x.flatten(2) for x in (q, k, v)), strict=True))
        hook = out.register_forward_pre_hook(take)
        try:
            with self._instead(layer, given):
                self._module(self._attention[layer])(*placed, **named)
        finally:
            hook.remove()
        return found[0].unflatten(-1, (self.n_heads, -1))

    @contextmanager
    def _instead(self, layer: int, given: Mapping[str, Tensor]) -> Generator[None, None, None]:
        """While inside, the projections return these: one tensor for each weight, joined where they are fused."""
        joined: dict[str, list[Tensor]] = {}
        for name, value in given.items():
            joined.setdefault(self._path_of(name, layer), []).append(value)
        hooks: list[Any] = []
        for path, values in joined.items():
            module, value = self._module(path), torch.cat(values, dim=-1)
            hooks.append(module.register_forward_pre_hook(lambda _m, args: (args[0][:0], *args[1:])))
            hooks.append(module.register_forward_hook(lambda _m, _a, _o, value=value: value))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def mlp(self, layer: int, read: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_model"]:
        """What the MLP adds to the stream, for a normed stream."""
        path = self._mlp_path(layer)
        return self._after("after_mlp", layer)(cast(Tensor, self._module(path)(read)))

    def halves(
        self, layer: int, gate: Float[Tensor, "row pos d_model"], up: Float[Tensor, "row pos d_model"]
    ) -> tuple[Tensor, Tensor]:
        """`gate_pre` and `up` of two normed streams."""
        made = [read @ self.model.weight(name, layer) for name, read in zip(_HALVES, (gate, up), strict=True)]
        biases = [self.model.table.bias(name, layer) for name in _HALVES]
        first, second = (x if b is None else x + b for x, b in zip(made, biases, strict=True))
        return first, second

    def mlp_of_halves(self, layer: int, gate_pre: Tensor, up: Tensor) -> Tensor:
        """What the MLP adds to the stream, from its two halves."""
        blank = gate_pre.new_zeros(1).expand(*gate_pre.shape[:2], self.embedding.shape[-1])
        with self._instead(layer, dict(zip(_HALVES, (gate_pre, up), strict=True))):
            made = self._module(self._mlp_path(layer))(blank)
        return self._after("after_mlp", layer)(made)

    # Writing to the stream ----------------------------------------------------------------------------------------

    def write(self, layer: int, z: Float[Tensor, "row pos head d_head"]) -> Float[Tensor, "row pos d_model"]:
        """What attention adds to the stream."""
        return self._after("after_attn", layer)(self._summed(layer, z))

    def results(
        self, layer: int, z: Float[Tensor, "row pos head d_head"], heads: Sequence[int] | None = None
    ) -> Float[Tensor, "chosen row pos d_model"]:
        """What each head (or each of `heads`) adds to the stream; an output bias belongs to none."""
        chosen = torch.arange(self.n_heads) if heads is None else torch.tensor(list(heads))
        chosen = chosen.to(z.device)
        made = torch.bmm(z.movedim(2, 0)[chosen].flatten(1, 2), self.model.weight("W_O", layer)[chosen])
        made = made.unflatten(1, z.shape[:2])
        if not self.normed_after:
            return made
        total = self._summed(layer, z)
        norm = self._after("after_attn", layer)
        return made * (_gain(norm, total) / _rms(norm, total))

    @property
    def normed_after(self) -> bool:
        """Whether attention's output goes through a norm, so that heads share it."""
        family = self.model.table.family
        return family is not None and family.after_attn is not None

    def _summed(self, layer: int, z: Tensor) -> Tensor:
        made = z.flatten(2) @ self.model.weight("W_O", layer).flatten(0, 1)
        bias = self.model.table.bias("W_O", layer)
        return made if bias is None else made + bias

    def _after(self, name: str, layer: int) -> Callable[[Tensor], Tensor]:
        """The norm after a sublayer; the identity where there is none."""
        path = getattr(self.model.table.family, name)
        if path is None:
            return _same
        if path == OWNER:
            raise InterpError(f"{self.model.source}: edge methods take transformers models, not a bridge around one")
        return self._module(path.format(layer=layer))

    def head(self, stream: Float[Tensor, "row last d_model"]) -> Float[Tensor, "row last vocab"]:
        """Logits of a stream that has left the last block."""
        return self.unembed(self.final(stream))

    def unembed(self, normed: Float[Tensor, "row last d_model"]) -> Float[Tensor, "row last vocab"]:
        """Logits of a normed stream."""
        parts = {site.part for site in self.model.table.sites}
        part = Part.LOGITS_PRE if Part.LOGITS_PRE in parts else Part.LOGITS
        logits = self._module(self._at(Site(part)))(normed)
        cap = getattr(getattr(self.model.module, "config", None), "final_logit_softcapping", None)
        return logits if cap is None else cast(Tensor, torch.tanh(logits / cap) * cap)

    # Where things are ---------------------------------------------------------------------------------------------

    def _at(self, site: Site) -> str:
        return self.model.table.reach(site).path

    def _module(self, path: str) -> nn.Module:
        return self.model.table.at(path)

    def _mlp_path(self, layer: int) -> str:
        return self._at(Site(Part.NEURONS, layer)).rpartition(".")[0]

    def _path_of(self, name: str, layer: int) -> str:
        family = self.model.table.family
        assert family is not None
        spec = family.weights[name]
        first = spec if isinstance(spec, Weight) else spec[0]
        return first.path.format(layer=layer).removesuffix(".weight")


def _same(x: Tensor) -> Tensor:
    return x


def _rms(norm: Any, x: Tensor) -> Tensor:
    """Root mean square as the norm computes it."""
    eps = float(getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", 0.0))
    return (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def _gain(norm: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """What the norm multiplies each coordinate with: its value at a stream of ones, whose rms is 1 (but for eps)."""
    ones = torch.ones_like(like[:1, :1])
    return norm(ones) * _rms(norm, ones)
