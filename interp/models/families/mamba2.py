"""Mamba-2: a state space with one decay per head and step; the output gate sits inside the norm before `out_proj`.

    z, xBC, dt = in_proj(attn_in);  x, B, C = silu(conv(xBC));  step = softplus(dt + dt_bias)
    state' = exp(step A) state + step B x;  readout = C state' + D x;  mixer_out = norm(readout * silu(z))

A = -exp(A_log), per head. Sites: `conv_in` xBC, `mixer_in` x, `state_in` B, `state_out` C, `step_size_pre` (with its
bias), `step_size`, `output_gate_pre` z, `output_gate` silu(z), `readout`. The decay is exp(step_size * A): the scan
works with sums of its logarithm, so no tensor holds it; it is edited through `step_size`.

Source: Mamba2Mixer of transformers 5.23; Dao and Gu, arXiv 2405.21060. Traps: in a whole forward the scan clamps the
step size to `config.time_step_limit` after this site, in decoding it does not: with a limit that bites, transformers'
own cached and uncached outputs differ (an edit is clamped in both). A value of a padding position is set to 0 after
`mixer_in`, `state_in` and `state_out` are read. Where the kernels of mamba_ssm are installed the scan is one fused call
in which `mixer_in`, `state_in`, `state_out`, `step_size_pre` and `step_size` do not fire: load with kernels off.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from interp.core.sites import Part
from interp.models.families.mamba import END_WEIGHTS, MIXER, OUT_RULE, convolved, ends
from interp.models.family import Family, Reach, Rule, Tiny, Weight
from interp.models.linear_views import STEP_PER_HEAD, STEP_PRE_PER_HEAD, STREAM_RULE, piece

PROJECTED = ("d_inner", "d_conv", "n_state_heads")
CONVOLVED = (Part.MIXER_IN, Part.STATE_IN, Part.STATE_OUT)
STEP_AXES = ("batch", "pos", "state_head")
INNER = ("batch", "pos", "d_inner")
GROUPS = ("batch", "pos", "d_grouped")


def _fields(of: Mapping[str, int]) -> dict[str, Any]:
    return {
        "vocab_size": of["d_vocab"], "hidden_size": of["d_model"], "num_hidden_layers": of["n_layers"],
        "state_size": 4, "expand": 2, "conv_kernel": 4, "num_heads": 8, "head_dim": of["d_model"] // 4,
        "n_groups": 2, "chunk_size": 5, "tie_word_embeddings": False,
    }  # fmt: skip


def _convolved(mixer: Any) -> tuple[int, int, int]:
    width = mixer.n_groups * mixer.ssm_state_size
    return mixer.intermediate_size, width, width


def step_parts(mixer: str) -> dict[Part, Reach]:
    """What is inside Mamba-2's mixer, wherever it stands."""
    return {
        Part.CONV_IN: Reach(path=f"{mixer}.in_proj", chunk=(1, PROJECTED), axes=("batch", "pos", "d_conv")),
        **{
            part: Reach(path=mixer, side="op", op="transpose", nth=1, view=piece(_convolved, i), axes=axes)
            for i, (part, axes) in enumerate(zip(CONVOLVED, (INNER, GROUPS, GROUPS), strict=True))
        },
        Part.STEP_SIZE_PRE: Reach(path=mixer, side="op", op="add", single=STEP_PRE_PER_HEAD, axes=STEP_AXES),
        Part.STEP_SIZE: Reach(path=mixer, side="op", op="softplus", single=STEP_PER_HEAD, axes=STEP_AXES),
        Part.OUTPUT_GATE_PRE: Reach(path=f"{mixer}.in_proj", chunk=(0, PROJECTED), axes=INNER),
        Part.OUTPUT_GATE: Reach(path=f"{mixer}.norm", side="op", op="silu", axes=INNER),
        Part.READOUT: Reach(path=f"{mixer}.norm", side="input", axes=INNER),
        Part.MIXER_OUT: Reach(path=f"{mixer}.out_proj", side="input"),
    }


def _step_pre(layer: Any, x: Tensor) -> Tensor:
    mixer = layer.mixer
    return mixer.in_proj(x)[..., -mixer.num_heads :] + mixer.dt_bias


def _normed(layer: Any, readout: Tensor, z: Tensor) -> Tensor:
    """Group by group: root mean square 1, then the weight."""
    norm = layer.mixer.norm
    y = (readout * F.silu(z)).unflatten(-1, (-1, norm.group_size))
    y = y / (y.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    return norm.weight * y.flatten(-2)


RULES = (
    Rule(
        text="norm(readout * silu(output_gate_pre)) == mixer_out",
        result=Part.MIXER_OUT,
        inputs=(Part.READOUT, Part.OUTPUT_GATE_PRE),
        function=_normed,
    ),
    Rule(
        text="silu(output_gate_pre) == output_gate",
        result=Part.OUTPUT_GATE,
        inputs=(Part.OUTPUT_GATE_PRE,),
        function=lambda _layer, z: z * z.sigmoid(),
    ),
    Rule(
        text="attn_in @ W_output_gate == output_gate_pre",
        result=Part.OUTPUT_GATE_PRE,
        inputs=(Part.ATTN_IN,),
        function=lambda layer, x: layer.mixer.in_proj(x)[..., : layer.mixer.intermediate_size],
    ),
    Rule(
        text="attn_in @ W_step + dt_bias == step_size_pre",
        result=Part.STEP_SIZE_PRE,
        inputs=(Part.ATTN_IN,),
        function=_step_pre,
    ),
    Rule(
        text="log(1 + exp(step_size_pre)) == step_size",
        result=Part.STEP_SIZE,
        inputs=(Part.STEP_SIZE_PRE,),
        function=lambda _layer, before: torch.log1p(before.exp()),
    ),
    *(
        Rule(
            text=f"silu(conv(conv_in)) == {part}",
            result=part,
            inputs=(Part.CONV_IN,),
            function=lambda layer, x, i=i: _pieces(layer, x)[i],
        )
        for i, part in enumerate(CONVOLVED)
    ),
)


def _pieces(layer: Any, x: Tensor) -> tuple[Tensor, ...]:
    return convolved(layer.mixer.conv1d, x).split(_convolved(layer.mixer), dim=-1)


FAMILY = Family(
    name="mamba2",
    model_types=("mamba2",),
    blocks="backbone.layers",
    parts={**ends(), **step_parts(MIXER)},
    weights={
        **END_WEIGHTS,
        "W_output_gate": Weight(path=f"{MIXER}.in_proj.weight", chunk=(0, PROJECTED)),
        "W_conv_in": Weight(path=f"{MIXER}.in_proj.weight", chunk=(1, PROJECTED)),
        "W_step": Weight(path=f"{MIXER}.in_proj.weight", chunk=(2, PROJECTED)),
    },
    sizes={
        "d_inner": f"{MIXER}.intermediate_size",
        "d_conv": f"{MIXER}.conv_dim",
        "n_state_heads": f"{MIXER}.num_heads",
        "state_head": f"{MIXER}.num_heads",
    },
    rules=(STREAM_RULE, OUT_RULE, *RULES),
    tiny={"mamba2": Tiny(config="Mamba2Config", model="Mamba2ForCausalLM", fields=_fields)},
)
