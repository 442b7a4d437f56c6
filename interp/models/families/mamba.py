"""Mamba: one selective state space per block, no attention, no MLP. `attn_in` and `attn_out` are the mixer's ends.

    x, z = in_proj(attn_in);  u = silu(conv(x));  latent, B, C = x_proj(u);  step = softplus(dt_proj(latent))
    state' = exp(step * A) state + step * B * u;  mixer_out = (C state' + D u) * silu(z);  A = -exp(A_log)

Sites: `conv_in` x, `mixer_in` u, `step_latent`, `state_in` B, `state_out` C, `step_size_pre`, `step_size`, `decay`
exp(step * A), `output_gate_pre` z, `output_gate` silu(z). An edit of `mixer_in` reaches `x_proj` as well.

Source: MambaMixer of transformers 5.23; Gu and Dao, arXiv 2312.00752. Traps: a value of a padding position is set to 0
after `mixer_in` is read; where the kernels of mamba_ssm are installed the scan is one fused call, and the sites inside
it (`mixer_in` to `decay`, `output_gate`) do not fire: load with kernels off. `decay` holds d_inner * d_state values
for every position.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from interp.core.sites import Part
from interp.models.family import Family, Reach, Rule, Tiny, Weight
from interp.models.linear_views import CHANNELS_FIRST, STATES_FIRST, STREAM_RULE

BLOCK = "backbone.layers.{layer}"
MIXER = f"{BLOCK}.mixer"
THREE = ("d_step", "d_state", "d_state")


def ends(block: str = BLOCK) -> dict[Part, Reach]:
    """Embedding, stream and unembedding of models in Mamba's layout."""
    return {
        Part.EMBED: Reach(path="backbone.embeddings"),
        Part.RESID_PRE: Reach(path=block, side="input"),
        Part.ATTN_IN: Reach(path=f"{block}.norm"),
        Part.ATTN_OUT: Reach(path=f"{block}.mixer"),
        Part.RESID_POST: Reach(path=block),
        Part.FINAL_NORM: Reach(path="backbone.norm_f"),
        Part.LOGITS: Reach(path="lm_head"),
    }


END_WEIGHTS = {
    "W_E": Weight(path="backbone.embeddings.weight", transpose=False),
    "W_U": Weight(path="lm_head.weight"),
    "W_mixer": Weight(path=f"{MIXER}.out_proj.weight"),
}


def mamba_fields(of: Mapping[str, int]) -> dict[str, Any]:
    """Config fields of a tiny model."""
    return {
        "vocab_size": of["d_vocab"], "hidden_size": of["d_model"], "num_hidden_layers": of["n_layers"],
        "state_size": 4, "expand": 2, "conv_kernel": 4, "time_step_rank": 5, "tie_word_embeddings": False,
    }  # fmt: skip


def convolved(conv: Any, x: Tensor) -> Tensor:
    """silu of a causal convolution, channel by channel; x is (batch, pos, channel)."""
    padded = F.pad(x.mT, (conv.kernel_size[0] - 1, 0))
    return F.silu(F.conv1d(padded, conv.weight, conv.bias, groups=x.shape[-1])).mT


def _latents(layer: Any, u: Tensor) -> Tensor:
    return u @ layer.mixer.x_proj.weight[: layer.mixer.time_step_rank].T


def _step_size(layer: Any, latent: Tensor) -> Tensor:
    return torch.log1p(torch.exp(latent @ layer.mixer.dt_proj.weight.T + layer.mixer.dt_proj.bias))


def _decay(layer: Any, before: Tensor) -> Tensor:
    """exp(softplus(p) A) is (1 + e^p) to the power A."""
    return (1 + before.exp()[..., None]) ** -layer.mixer.A_log.exp()


def _out(layer: Any, z: Tensor) -> Tensor:
    return F.linear(z, layer.mixer.out_proj.weight, layer.mixer.out_proj.bias)


OUT_RULE = Rule(text="mixer_out @ W_mixer == attn_out", result=Part.ATTN_OUT, inputs=(Part.MIXER_OUT,), function=_out)
RULES = (
    STREAM_RULE,
    OUT_RULE,
    Rule(
        text="attn_in @ W_output_gate == output_gate_pre",
        result=Part.OUTPUT_GATE_PRE,
        inputs=(Part.ATTN_IN,),
        function=lambda layer, x: layer.mixer.in_proj(x)[..., layer.mixer.intermediate_size :],
    ),
    Rule(
        text="silu(output_gate_pre) == output_gate",
        result=Part.OUTPUT_GATE,
        inputs=(Part.OUTPUT_GATE_PRE,),
        function=lambda _layer, z: z * z.sigmoid(),
    ),
    Rule(
        text="silu(conv(conv_in)) == mixer_in",
        result=Part.MIXER_IN,
        inputs=(Part.CONV_IN,),
        function=lambda layer, x: convolved(layer.mixer.conv1d, x),
    ),
    Rule(text="mixer_in @ W_step == step_latent", result=Part.STEP_LATENT, inputs=(Part.MIXER_IN,), function=_latents),
    Rule(
        text="softplus(step_latent @ W + b) == step_size",
        result=Part.STEP_SIZE,
        inputs=(Part.STEP_LATENT,),
        function=_step_size,
    ),
    Rule(
        text="exp(-exp(A_log) * softplus(step_size_pre)) == decay",
        result=Part.DECAY,
        inputs=(Part.STEP_SIZE_PRE,),
        function=_decay,
    ),
)

FAMILY = Family(
    name="mamba",
    model_types=("mamba",),
    blocks="backbone.layers",
    parts={
        **ends(),
        Part.CONV_IN: Reach(path=f"{MIXER}.in_proj", chunk=(0, 2)),
        Part.OUTPUT_GATE_PRE: Reach(path=f"{MIXER}.in_proj", chunk=(1, 2), axes=("batch", "pos", "d_inner")),
        Part.MIXER_IN: Reach(path=MIXER, side="op", op="transpose", nth=1),
        Part.STEP_LATENT: Reach(path=f"{MIXER}.x_proj", chunk=(0, THREE)),
        Part.STATE_IN: Reach(path=f"{MIXER}.x_proj", chunk=(1, THREE), axes=("batch", "pos", "d_state")),
        Part.STATE_OUT: Reach(path=f"{MIXER}.x_proj", chunk=(2, THREE), axes=("batch", "pos", "d_state")),
        Part.STEP_SIZE_PRE: Reach(path=MIXER, side="op", op="add", view=CHANNELS_FIRST),
        Part.STEP_SIZE: Reach(path=MIXER, side="op", op="softplus", view=CHANNELS_FIRST),
        Part.DECAY: Reach(
            path=MIXER, side="op", op="exp", nth=1, view=STATES_FIRST, axes=("batch", "pos", "d_inner", "d_state")
        ),
        Part.OUTPUT_GATE: Reach(
            path=MIXER, side="op", op="silu", nth=1, view=CHANNELS_FIRST, axes=("batch", "pos", "d_inner")
        ),
        Part.MIXER_OUT: Reach(path=f"{MIXER}.out_proj", side="input"),
    },
    weights={
        **END_WEIGHTS,
        "W_conv_in": Weight(path=f"{MIXER}.in_proj.weight", chunk=(0, 2)),
        "W_output_gate": Weight(path=f"{MIXER}.in_proj.weight", chunk=(1, 2)),
        "W_step": Weight(path=f"{MIXER}.x_proj.weight", chunk=(0, THREE)),
        "W_state_in": Weight(path=f"{MIXER}.x_proj.weight", chunk=(1, THREE)),
        "W_state_out": Weight(path=f"{MIXER}.x_proj.weight", chunk=(2, THREE)),
    },
    sizes={
        "d_inner": f"{MIXER}.intermediate_size",
        "d_step": f"{MIXER}.time_step_rank",
        "d_state": f"{MIXER}.ssm_state_size",
    },
    rules=RULES,
    tiny={"mamba": Tiny(config="MambaConfig", model="MambaForCausalLM", fields=mamba_fields)},
)
