"""Which linear map does a transformer apply to its residual stream on one prompt, attention and norms held fixed?

With the attention patterns A and all norm denominators frozen at the prompt's own values,
    mid_l  = pre_l + sum_h A_h (N(pre_l) W_V W_O)_h + const      post_l = mid_l + mlp_out_l
is affine in everything that enters the stream: the embeddings and what each MLP writes. `Frozen` holds the pieces, and
`pull` walks a direction that is read at some layer back through the layers below: at each place something may enter, it
yields the gradient there, batched over directions. That is the backward pass of autograd with stop-gradients on
attention, norms and MLPs, without a graph in memory and without a copy of the prompt for each direction.
`freeze` checks every piece against what the model computed: a family with another kind of attention is refused. The
pieces lie, and everything after the one forward is computed, on the cpu.
Source: E. Ameisen et al. 2025, https://transformer-circuits.pub/2025/attribution-graphs/methods.html.
Trap: frozen attention says nothing about why a head attends where it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.circuits.transcoder_graph_norms import FrozenNorm, check_close, freeze_norm, identity_norm
from interp.core.errors import InterpError
from interp.core.sites import Part, Site
from interp.instrument.capture import Activations, capture
from interp.models.family import OWNER
from interp.models.model import LoadedModel

NEEDED = (Part.RESID_PRE, Part.ATTN_IN, Part.PATTERN, Part.ATTN_OUT, Part.RESID_MID, Part.MLP_IN, Part.MLP_OUT,
          Part.RESID_POST)  # fmt: skip
Place = Literal["mlp_out", "attn_out", "embed"]
Extra = Callable[[int, Tensor], Tensor | None]
"""(layer, gradient at mlp_out) -> gradient at resid_mid through a linear path beside the MLP, if there is one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FrozenLayer:
    """One block on one prompt."""

    attn_norm: FrozenNorm
    after_attn: FrozenNorm
    mlp_norm: FrozenNorm
    pattern: Float[Tensor, "head query key"]
    W_V: Float[Tensor, "d_model kv_width"]
    W_O: Float[Tensor, "head d_head d_model"]
    b_O: Float[Tensor, " d_model"] | None
    values: Float[Tensor, "kv_head pos d_head"]
    constant: Float[Tensor, "pos d_model"]
    """What attention adds when its linear part is 0: biases and shifts."""
    mlp_in: Float[Tensor, "pos d_model"]
    resid_mid: Float[Tensor, "pos d_model"]
    mlp_out: Float[Tensor, "pos d_model"]
    attn_out: Float[Tensor, "pos d_model"]

    @property
    def n_kv_heads(self) -> int:
        return self.W_V.shape[1] // self.W_O.shape[1]

    def pull_heads(self, g: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch head pos d_head"]:
        """Gradient at each head's values, before heads of a group are summed; g is at attn_out."""
        n_heads, d_head, d_model = self.W_O.shape
        raw = self.after_attn.pull(g)
        z = (raw @ self.W_O.reshape(-1, d_model).T).unflatten(-1, (n_heads, d_head)).transpose(1, 2)
        n_pos = g.shape[1]
        return self.pattern[:, :n_pos, :n_pos].transpose(1, 2) @ z

    def pull_attention(self, g: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Gradient at resid_pre that comes through the heads."""
        values = self.pull_heads(g)
        grouped = values.unflatten(1, (self.n_kv_heads, -1)).sum(2)
        return self.attn_norm.pull(grouped.transpose(1, 2).flatten(2) @ self.W_V.T)


@dataclass(frozen=True, kw_only=True, eq=False)
class Frozen:
    """A model on one prompt, attention and norms held fixed."""

    tokens: Int[Tensor, " pos"]
    layers: tuple[FrozenLayer, ...]
    final_norm: FrozenNorm
    W_U: Float[Tensor, "d_model vocab"]
    b_U: Float[Tensor, " vocab"] | None
    embed: Float[Tensor, "pos d_model"]
    positions: Float[Tensor, "pos d_model"]
    """What enters the stream beside the token embeddings: learned positions."""
    logits: Float[Tensor, "vocab"]
    """Of the last position, before a soft cap."""
    mismatch: float
    """Largest relative difference between a frozen piece and the model."""

    @property
    def n_pos(self) -> int:
        return len(self.tokens)

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    def pull(
        self, g: Float[Tensor, "batch pos d_model"], layer: int, extra: Extra | None = None, *, mid: bool = True
    ) -> Iterator[tuple[Place, int, Float[Tensor, "batch pos d_model"]]]:
        """Gradients at every place below, from the top down. g is at resid_mid of `layer`, or at its resid_post.

        Yields ("mlp_out", l, g): what the MLP of layer l adds is multiplied with g; ("attn_out", l, g) likewise; at the
        end ("embed", -1, g).
        """
        for number in range(layer, -1, -1):
            if number < layer or not mid:
                yield "mlp_out", number, g
                straight = None if extra is None else extra(number, g)
                g = g if straight is None else g + straight
            yield "attn_out", number, g
            g = g + self.layers[number].pull_attention(g)
        yield "embed", -1, g


@torch.no_grad()
def freeze(
    model: LoadedModel, tokens: Int[Tensor, " pos"], *, dtype: torch.dtype = torch.float32, tolerance: float = 2e-3
) -> Frozen:
    """Run the prompt once and freeze it. Raises InterpError for a model that is not affine then."""
    if model.hub.pending:  # its activations would be frozen as those of the untouched model
        raise InterpError("a capture or an edit of this model is open; build the graph outside it")
    parts, tokens = _checked(model, tokens), tokens.cpu()
    top = Part.LOGITS_PRE if Part.LOGITS_PRE in parts else Part.LOGITS
    ends = [Site(Part.EMBED), Site(Part.FINAL_NORM), Site(top)]
    sites = [Site(part, layer) for layer in range(model.n_layers) for part in NEEDED]
    with capture(model, [*sites, *ends]) as acts:
        model(tokens[None])
    worst: list[float] = []
    layers = tuple(_layer(model, layer, acts, dtype, tolerance, worst) for layer in range(model.n_layers))
    last = acts[Site(Part.RESID_POST, model.n_layers - 1)][0].to("cpu", dtype)
    final = _norm(model, Site(Part.FINAL_NORM), last, acts[Site(Part.FINAL_NORM)][0].to("cpu", dtype), tolerance)
    W_U, b_U = model.weight("W_U").detach().to("cpu", dtype), _cast(model.table.bias("W_U"), dtype)
    logits = acts[Site(top)][0, -1].to("cpu", dtype)
    read = final.push(last)[-1] @ W_U
    worst.append(check_close(read if b_U is None else read + b_U, logits, "the unembedding", tolerance))
    embed, first = acts[Site(Part.EMBED)][0].to("cpu", dtype), acts[Site(Part.RESID_PRE, 0)][0].to("cpu", dtype)
    return Frozen(
        tokens=tokens, layers=layers, final_norm=final, W_U=W_U, b_U=b_U, embed=embed, positions=first - embed,
        logits=logits, mismatch=max(worst),
    )  # fmt: skip


def _checked(model: LoadedModel, tokens: Tensor) -> frozenset[Part]:
    """The parts this model has; all that are needed are among them."""
    parts = frozenset(model.table.family.parts if model.table.family else ())
    missing = [part for part in (*NEEDED, Part.EMBED, Part.FINAL_NORM) if part not in parts]
    if missing:
        raise InterpError(
            f"{model.source} has no {missing[0]}: attribution graphs need a transformer whose blocks are attention "
            "and an MLP, one after the other"
        )
    if tokens.numel() < 2:
        raise InterpError(f"a prompt of {tokens.numel()} token has nothing to attribute to; give at least 2")
    return parts


def _layer(
    model: LoadedModel, layer: int, acts: Activations, dtype: torch.dtype, tolerance: float, worst: list[float]
) -> FrozenLayer:
    pre, attn_in, pattern, attn_out, mid, mlp_in, mlp_out, post = (
        acts[Site(part, layer)][0].to("cpu", dtype) for part in NEEDED
    )
    W_V, W_O = (
        model.weight("W_V", layer).detach().to("cpu", dtype),
        model.weight("W_O", layer).detach().to("cpu", dtype),
    )
    b_V, b_O = (_cast(model.table.bias(name, layer), dtype) for name in ("W_V", "W_O"))
    d_head = W_O.shape[1]
    attn_norm = _norm(model, Site(Part.ATTN_IN, layer), pre, attn_in, tolerance)

    def values(x: Tensor) -> Tensor:
        found = x @ W_V if b_V is None else x @ W_V + b_V
        return found.unflatten(-1, (-1, d_head)).transpose(0, 1)

    def raw(x: Tensor) -> Tensor:
        """Attention's output before a norm behind it, from its normed input."""
        heads = values(x)
        mixed = pattern @ heads.repeat_interleave(len(W_O) // len(heads), dim=0)
        out = torch.einsum("hqe,hed->qd", mixed, W_O)
        return out if b_O is None else out + b_O

    behind = _behind(model, layer, raw(attn_in), attn_out, tolerance)
    name = f"layer {layer} of {model.source}"
    worst.append(check_close(behind.push(raw(attn_norm.push(pre))), attn_out, f"attention in {name}", tolerance))
    worst.append(check_close(pre + attn_out, mid, f"resid_pre + attn_out == resid_mid in {name}", tolerance))
    worst.append(check_close(mid + mlp_out, post, f"resid_mid + mlp_out == resid_post in {name}", tolerance))
    if layer + 1 < model.n_layers:
        after = acts[Site(Part.RESID_PRE, layer + 1)][0].to("cpu", dtype)
        worst.append(check_close(post, after, f"the stream behind {name}", tolerance))
    return FrozenLayer(
        attn_norm=attn_norm, after_attn=behind, mlp_norm=_norm(model, Site(Part.MLP_IN, layer), mid, mlp_in, tolerance),
        pattern=pattern, W_V=W_V, W_O=W_O, b_O=b_O, values=values(attn_in),
        constant=behind.push(raw(attn_norm.push(0 * pre))), mlp_in=mlp_in, resid_mid=mid, mlp_out=mlp_out,
        attn_out=attn_out,
    )  # fmt: skip


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.detach().to("cpu", dtype)


def _norm(model: LoadedModel, site: Site, x: Tensor, y: Tensor, tolerance: float) -> FrozenNorm:
    """The norm whose output the site is; none if the sublayer reads the stream itself."""
    reach = model.table.reach(site)
    if reach.side == "input":
        check_close(x, y, f"{site} without a norm", tolerance)
        return identity_norm(len(x), x[0])
    return freeze_norm(model.module.get_submodule(reach.path), x, y, str(site), tolerance)


def _behind(model: LoadedModel, layer: int, raw: Tensor, out: Tensor, tolerance: float) -> FrozenNorm:
    """The norm between attention and the stream, where there is one."""
    path = model.table.family.after_attn if model.table.family else None
    if path == OWNER:
        raise InterpError(f"{model.source} is a bridged model; load its transformers original for attribution graphs")
    if path is None:
        return identity_norm(len(raw), raw[0])
    module = model.module.get_submodule(path.format(layer=layer))
    return freeze_norm(module, raw, out, f"the norm behind attention {layer}", tolerance)
