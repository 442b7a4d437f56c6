"""What models of flash-linear-attention share: names of modules and weights around their layers.

Written from the source of flash-linear-attention 0.6.0 (fla/models, fla/layers) and never run with its kernels, which
need Triton and a GPU: `interp verify` says on such a machine whether it holds. Import `fla` before loading: that makes
its classes known to transformers. Their layers are model.layers.N.attn and .mlp; the norm before the MLP adds the
stream up inside (`fuse_norm`), so there is no `resid_mid`. The MLP's product (`fuse_swiglu`) and the gated norm
(`fuse_norm`) are fused calls that take their weights as arguments: `gate`, `neurons` and `output_gate` are computed
again beside them. Without `fuse_swiglu` there are no `gate` and `neurons`. `q`, `k` and `v` are the projections, before
the short convolution and the feature map. Texts of unequal length are packed into one row inside each layer: give
texts of equal length, as sites inside would have other shapes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from interp.core.sites import Part
from interp.models.family import ModuleCall, Reach, Rule, Tap, Weight

BLOCK = "model.layers.{layer}"
ATTN = f"{BLOCK}.attn"
MLP = f"{BLOCK}.mlp"
STATE = ("batch", "pos", "...")
INNER = ("batch", "pos", "d_inner")
OPTIONAL = frozenset({Part.GATE, Part.NEURONS, Part.READOUT, Part.OUTPUT_GATE_PRE, Part.OUTPUT_GATE})


def _arguments(call: ModuleCall, *names: str) -> list[Any]:
    """By position or keyword."""
    return [*call.args[: len(names)], *(call.kwargs.get(name) for name in names[len(call.args) :])]


def swiglu(call: ModuleCall, tap: Tap) -> Tensor:
    """What SwiGLULinear returns."""
    before, up, weight, bias = _arguments(call, "x", "y", "weight", "bias")
    gate = tap(Part.GATE, F.silu(before))
    return F.linear(tap(Part.NEURONS, gate * up), weight, bias)


def gated_norm(call: ModuleCall, tap: Tap) -> Tensor:
    """What FusedRMSNormGated returns, in float32 as in its kernel."""
    norm: Any = call.module
    x, before = _arguments(call, "x", "g")
    before, wide = before.float(), x.float()
    gate = tap(Part.OUTPUT_GATE, before.sigmoid() if norm.activation == "sigmoid" else F.silu(before))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    return ((normed if norm.weight is None else normed * norm.weight) * gate).to(x.dtype)


def gated_out(norm: str) -> dict[Part, Reach]:
    """The end of a layer whose norm, of this name, takes the output gate as its second argument."""
    path, gate = f"{ATTN}.{norm}", f"{ATTN}.g_proj"
    return {
        Part.READOUT: Reach(path=path, side="input"),
        Part.OUTPUT_GATE_PRE: Reach(path=gate, axes=INNER),
        Part.OUTPUT_GATE: Reach(path=path, side="replay", replay=gated_norm, needs=gate, axes=STATE),
        Part.MIXER_OUT: Reach(path=f"{ATTN}.o_proj", side="input"),
    }


def fla_parts(*, q: str = "q_proj", k: str | None = "k_proj", v: str = "v_proj") -> dict[Part, Reach]:
    """Ends, stream, projections and MLP, with the names of the layer's projections."""
    names = {Part.Q: q, Part.V: v, **({Part.K: k} if k else {})}
    return {
        Part.EMBED: Reach(path="model.embeddings"),
        Part.RESID_PRE: Reach(path=BLOCK, side="input"),
        Part.ATTN_IN: Reach(path=f"{BLOCK}.attn_norm"),
        **{part: Reach(path=f"{ATTN}.{name}", axes=STATE) for part, name in names.items()},
        Part.ATTN_OUT: Reach(path=ATTN),
        Part.MLP_IN: Reach(path=f"{BLOCK}.mlp_norm"),
        Part.GATE_PRE: Reach(path=f"{MLP}.gate_proj"),
        Part.GATE: Reach(path=f"{MLP}.swiglu_linear", side="replay", replay=swiglu),
        Part.UP: Reach(path=f"{MLP}.up_proj"),
        Part.NEURONS: Reach(path=f"{MLP}.swiglu_linear", side="replay", replay=swiglu),
        Part.MLP_OUT: Reach(path=MLP),
        Part.RESID_POST: Reach(path=BLOCK),
        Part.FINAL_NORM: Reach(path="model.norm"),
        Part.LOGITS: Reach(path="lm_head"),
    }


FLA_WEIGHTS = {
    "W_E": Weight(path="model.embeddings.weight", transpose=False),
    "W_gate": Weight(path=f"{MLP}.gate_proj.weight"),
    "W_up": Weight(path=f"{MLP}.up_proj.weight"),
    "W_down": Weight(path=f"{MLP}.down_proj.weight"),
    "W_mixer": Weight(path=f"{ATTN}.o_proj.weight"),
    "W_U": Weight(path="lm_head.weight"),
}

STREAM = Rule(
    text="resid_pre + attn_out + mlp_out == resid_post",
    result=Part.RESID_POST,
    inputs=(Part.RESID_PRE, Part.ATTN_OUT, Part.MLP_OUT),
    function=lambda _layer, before, mixed, added: before + mixed + added,
)

MLP_OUT = Rule(
    text="silu(gate_pre) * up @ W_down == mlp_out",
    result=Part.MLP_OUT,
    inputs=(Part.GATE_PRE, Part.UP),
    function=lambda layer, before, up: (before * before.sigmoid() * up) @ layer.mlp.down_proj.weight.T,
)


def mixed_out(layer: Any, x: Tensor) -> Tensor:
    return x @ layer.attn.o_proj.weight.T


OUT = Rule(text="mixer_out @ W_mixer == attn_out", result=Part.ATTN_OUT, inputs=(Part.MIXER_OUT,), function=mixed_out)


def log_gate(layer: Any, before: Tensor) -> Tensor:
    """log(sigmoid(x)) / n is -log(1 + e^-x) / n; one row of channels per head."""
    return (-torch.log1p(torch.exp(-before)) / layer.attn.gate_logit_normalizer).flatten(2)
