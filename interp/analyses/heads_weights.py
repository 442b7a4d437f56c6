"""What heads and neurons read and write, from weights alone (a helper of `heads` and `glu_neurons`).

A norm is linear up to its scale: x -> s(x) g * x, or s(x) g * (x - mean x) for LayerNorm. The scale changes no sign and
no order, so g and the centring are folded into the weights and the scale is left out.

Copying: the full OV circuit maps each token's embedding to logits, M = W_E C G_l W_V W_O C G_f W_U (token, token).
    copying = sum Re(lambda) / sum |lambda|    over the eigenvalues of M; 1 if every token raises itself
(Elhage et al. 2021, https://transformer-circuits.pub/2021/framework). The nonzero ones are those of the small product
W_O (C G_f W_U W_E C G_l) W_V (d_head, d_head), which is what is computed.
    self_top = share of tokens whose own logit is the largest of its row of M
Beware: only the direct path of the raw embedding is seen, not what earlier layers make of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.core.sites import Part, Site
from interp.models.model import LoadedModel

SELF_TOP_TOKENS = 512
"""Tokens among which a token's own logit has to be the largest."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Fold:
    """The linear part of a norm."""

    gain: Float[Tensor, " d"]
    centres: bool
    """Whether it subtracts the mean first."""

    def __call__(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """What the norm does to a vector, up to scale."""
        return self.gain * (x - x.mean(-1, keepdim=True) if self.centres else x)

    def back(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Its transpose: a reader behind the norm as one before it."""
        y = self.gain * x
        return y - y.mean(-1, keepdim=True) if self.centres else y


def fold_of(norm: nn.Module, d: int) -> Fold:
    """The linear part of a norm module, from what it does to vectors of +1 and -1, whose norm is 1.

    Its `forward` is called, not the module: hooks on it belong to the model's own runs.
    """
    like = next(norm.parameters(), None)
    signs = torch.ones(d, dtype=torch.float32) if like is None else torch.ones(d, dtype=like.dtype, device=like.device)
    ones = signs.clone()
    signs[1::2] = -1
    with torch.no_grad():
        gain = (norm.forward(signs) - norm.forward(-signs)) / 2 * signs
        centres = bool((norm.forward(ones) - norm.forward(-ones)).abs().max() < 0.1 * gain.abs().max())
    return Fold(gain=gain.detach().double().cpu(), centres=centres)


def fold_before(model: LoadedModel, part: Part, layer: int | None) -> Fold:
    """The norm whose output is a site (`attn_in`, `mlp_in`, `final_norm`); no change where there is none."""
    d = model.dims.d_model or 0
    site = Site(part, layer)
    path = model.table.reach(site).path
    module = model.module.get_submodule(path)
    if "norm" not in type(module).__name__.lower():
        return Fold(gain=torch.ones(d, dtype=torch.float64), centres=False)
    return fold_of(module, d)


def fold_after(model: LoadedModel, part: Part, layer: int) -> Fold:
    """The norm between a sublayer and the stream, which some families have; no change where there is none."""
    d, family = model.dims.d_model or 0, model.table.family
    after = None if family is None else {Part.ATTN_OUT: family.after_attn, Part.MLP_OUT: family.after_mlp}[part]
    path = after.format(layer=layer) if after else ""
    if not path or path not in model.table.modules:
        return Fold(gain=torch.ones(d, dtype=torch.float64), centres=False)
    return fold_of(model.module.get_submodule(path), d)


def value_weights(model: LoadedModel, layer: int) -> Float[Tensor, "head d_model d_head"]:
    """W_V of every query head; grouped heads share theirs."""
    weight = model.weight("W_V", layer).detach().double().cpu()
    n_heads, n_kv = model.dims.n_heads or 1, model.dims.n_kv_heads or 1
    return weight.unflatten(1, (n_kv, -1)).movedim(1, 0).repeat_interleave(n_heads // n_kv, dim=0)


def output_weights(model: LoadedModel, layer: int) -> Float[Tensor, "head d_head d_model"]:
    """W_O of every head."""
    return model.weight("W_O", layer).detach().double().cpu()


def can_copy(model: LoadedModel, layer: int) -> bool:
    """Whether the table has the weights that the score needs, and they fit together."""
    table = model.table
    if not all(table.has_weight(name, layer) for name in ("W_V", "W_O")) or not table.has_weight("W_U"):
        return False
    values, out = model.weight("W_V", layer), model.weight("W_O", layer)
    n_kv = model.dims.n_kv_heads or 1
    return out.ndim == 3 and values.ndim == 2 and values.shape[1] == n_kv * out.shape[1]


def copying(
    model: LoadedModel, layers: list[int], tokens: Int[Tensor, " token"]
) -> dict[str, Float[Tensor, "layer head"]]:
    """`copying` and `self_top` of every head over some tokens, float64; NaN in layers without plain OV weights."""
    n_heads = model.dims.n_heads or 0
    found = {name: torch.full((len(layers), n_heads), torch.nan, dtype=torch.float64) for name in NAMES}
    embed = model.weight("W_E")[tokens].detach().double().cpu()
    final = fold_before(model, Part.FINAL_NORM, None)
    unembed = final.back(model.weight("W_U")[:, tokens].detach().double().cpu().T)  # (token, d_model)
    few = slice(0, SELF_TOP_TOKENS)
    for row, layer in enumerate(layers):
        if not can_copy(model, layer):
            continue
        before, after = fold_before(model, Part.ATTN_IN, layer), fold_after(model, Part.ATTN_OUT, layer)
        read, write = before(embed), after.back(unembed)
        loop = write.T @ read  # (d_model, d_model): from the stream through the tokens to the next reading
        for head, (w_v, w_o) in enumerate(zip(value_weights(model, layer), output_weights(model, layer), strict=True)):
            found["copying"][row, head] = copying_score(w_o @ loop @ w_v)
            table = (read[few] @ w_v) @ (w_o @ write[few].T)
            found["self_top"][row, head] = float((table.argmax(1) == torch.arange(len(table))).double().mean())
    return found


NAMES = ("copying", "self_top")


def copying_score(product: Float[Tensor, "d_head d_head"]) -> float:
    """sum Re(lambda) / sum |lambda|; 0 for a head that writes nothing."""
    values = torch.linalg.eigvals(product)
    total = float(values.abs().sum())
    return float(values.real.sum()) / total if total > 1e-12 else 0.0
