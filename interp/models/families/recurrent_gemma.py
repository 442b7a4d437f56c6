"""RecurrentGemma (Griffin): two blocks of a gated linear recurrence to each block of local attention; GeGLU MLPs.

    x = conv(linear_x(attn_in));  i = sigmoid(x W_i + b_i);  r = sigmoid(x W_r + b_r);  log a = -8 softplus(L) r
    h' = a h + sqrt(1 - a^2) i x;  mixer_out = h' * gelu(linear_y(attn_in))

Sites: `conv_in` linear_x, `mixer_in` x, `input_gate` i, `recurrence_gate` r, `log_decay` log a, `decay` a, `hidden` h',
`output_gate_pre` linear_y, `output_gate`. An edit of `log_decay` changes a and the factor sqrt(1 - a^2); one of `decay`
changes a alone. At position 0 the model takes a = 0 and the factor 1, whatever these sites hold.

Source: transformers 5.23, RecurrentGemmaRglru; De et al., arXiv 2402.19427. `embed` is before its scaling by sqrt(d);
`logits` are softly capped, `logits_pre` are not. Traps: the recurrent state is kept in the module: a plain call
(`use_cache=False`) forgets it, and `LoadedModel.generate` does so before it begins. The convolution has no mask:
padding on the left would move all values after it, and is refused.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from interp.core.sites import Part
from interp.models.families.llama import BLOCK, llama_fields
from interp.models.family import Family, Reach, Rule, Tiny, Weight

MIX = f"{BLOCK}.temporal_block"
MLP = f"{BLOCK}.mlp_block"
LRU = f"{MIX}.rg_lru"


def _fields(of: Mapping[str, int]) -> dict[str, Any]:
    common = llama_fields(of, tie_word_embeddings=True)
    more = {
        "intermediate_size": 2 * of["d_mlp"], "lru_width": of["d_model"] + 16, "conv1d_width": 4,
        "block_types": ["recurrent", "attention"], "attention_window_size": 8, "logits_soft_cap": 30.0,
    }  # fmt: skip
    return {**common, **more}


def _gate(name: str) -> Any:
    """The blockwise product, block by block."""

    def gate(layer: Any, x: Tensor) -> Tensor:
        lru = layer.temporal_block.rg_lru
        weight, bias = getattr(lru, f"{name}_gate_weight"), getattr(lru, f"{name}_gate_bias")
        blocks = x.split(lru.block_width, dim=-1)
        return torch.cat([block @ w + b for block, w, b in zip(blocks, weight, bias, strict=True)], dim=-1)

    return gate


def _capped(model: Any, logits: Tensor) -> Tensor:
    cap = model.config.logits_soft_cap
    return cap * torch.tanh(logits / cap)


def _log_decay(layer: Any, gate: Tensor) -> Tensor:
    return gate * torch.log1p(layer.temporal_block.rg_lru.recurrent_param.exp()) * -8


def _convolved(layer: Any, x: Tensor) -> Tensor:
    conv = layer.temporal_block.conv_1d
    return F.conv1d(F.pad(x.mT, (conv.kernel_size[0] - 1, 0)), conv.weight, conv.bias, groups=x.shape[-1]).mT


RECURRENCE = {
    Part.CONV_IN: Reach(path=f"{MIX}.linear_x"),
    Part.MIXER_IN: Reach(path=LRU, side="input"),
    Part.INPUT_GATE_PRE: Reach(path=LRU, side="op", op="reshape", nth=1),
    Part.INPUT_GATE: Reach(path=LRU, side="op", op="sigmoid"),
    Part.RECURRENCE_GATE_PRE: Reach(path=LRU, side="op", op="reshape", nth=2),
    Part.RECURRENCE_GATE: Reach(path=LRU, side="op", op="sigmoid", nth=1),
    Part.LOG_DECAY: Reach(path=LRU, side="op", op="mul", nth=1, axes=("batch", "pos", "d_hidden")),
    Part.DECAY: Reach(path=LRU, side="op", op="exp", axes=("batch", "pos", "d_hidden")),
    Part.HIDDEN: Reach(path=LRU),
    Part.OUTPUT_GATE_PRE: Reach(path=f"{MIX}.linear_y"),
    Part.OUTPUT_GATE: Reach(path=f"{MIX}.act_fn"),
    Part.MIXER_OUT: Reach(path=f"{MIX}.linear_out", side="input"),
}
ATTENTION = {
    Part.Q: Reach(path=f"{MIX}.q_proj", heads="n_heads"),
    Part.K: Reach(path=f"{MIX}.k_proj", heads="n_kv_heads"),
    Part.V: Reach(path=f"{MIX}.v_proj", heads="n_kv_heads"),
    Part.ATTN_SCORES: Reach(path=MIX, side="attention", needs=f"{MIX}.q_proj"),
    Part.PATTERN: Reach(path=MIX, side="attention", needs=f"{MIX}.q_proj"),
    Part.Z: Reach(path=f"{MIX}.o_proj", side="input", heads="n_heads"),
}

FAMILY = Family(
    name="recurrent-gemma",
    model_types=("recurrent_gemma",),
    blocks="model.layers",
    parts={
        Part.EMBED: Reach(path="model.embed_tokens"),
        Part.RESID_PRE: Reach(path=BLOCK, side="input"),
        Part.ATTN_IN: Reach(path=f"{BLOCK}.temporal_pre_norm"),
        **ATTENTION,
        **RECURRENCE,
        Part.ATTN_OUT: Reach(path=MIX),
        Part.RESID_MID: Reach(path=f"{BLOCK}.channel_pre_norm", side="input", carry=BLOCK),
        Part.MLP_IN: Reach(path=f"{BLOCK}.channel_pre_norm"),
        Part.GATE_PRE: Reach(path=f"{MLP}.gate_proj"),
        Part.GATE: Reach(path=f"{MLP}.act_fn"),
        Part.UP: Reach(path=f"{MLP}.up_proj"),
        Part.NEURONS: Reach(path=f"{MLP}.down_proj", side="input"),
        Part.MLP_OUT: Reach(path=MLP),
        Part.RESID_POST: Reach(path=BLOCK),
        Part.FINAL_NORM: Reach(path="model.final_norm"),
        Part.LOGITS_PRE: Reach(path="lm_head"),
        Part.LOGITS: Reach(path="", item="logits"),
    },
    weights={
        "W_E": Weight(path="model.embed_tokens.weight", transpose=False),
        "W_Q": Weight(path=f"{MIX}.q_proj.weight"),
        "W_K": Weight(path=f"{MIX}.k_proj.weight"),
        "W_V": Weight(path=f"{MIX}.v_proj.weight"),
        "W_O": Weight(path=f"{MIX}.o_proj.weight", heads="n_heads"),
        "W_conv_in": Weight(path=f"{MIX}.linear_x.weight"),
        "W_output_gate": Weight(path=f"{MIX}.linear_y.weight"),
        "W_mixer": Weight(path=f"{MIX}.linear_out.weight"),
        "W_gate": Weight(path=f"{MLP}.gate_proj.weight"),
        "W_up": Weight(path=f"{MLP}.up_proj.weight"),
        "W_down": Weight(path=f"{MLP}.down_proj.weight"),
        "W_U": Weight(path="lm_head.weight"),
    },
    sizes={"d_inner": f"{MIX}.lru_width", "d_hidden": f"{MIX}.lru_width"},
    rules=(
        Rule(text="conv(conv_in) == mixer_in", result=Part.MIXER_IN, inputs=(Part.CONV_IN,), function=_convolved),
        Rule(
            text="mixer_in @ W_i + b_i == input_gate_pre",
            result=Part.INPUT_GATE_PRE,
            inputs=(Part.MIXER_IN,),
            function=_gate("input"),
        ),
        Rule(
            text="mixer_in @ W_r + b_r == recurrence_gate_pre",
            result=Part.RECURRENCE_GATE_PRE,
            inputs=(Part.MIXER_IN,),
            function=_gate("recurrent"),
        ),
        Rule(
            text="1 / (1 + exp(-input_gate_pre)) == input_gate",
            result=Part.INPUT_GATE,
            inputs=(Part.INPUT_GATE_PRE,),
            function=lambda _layer, x: 1 / (1 + torch.exp(-x)),
        ),
        Rule(
            text="1 / (1 + exp(-recurrence_gate_pre)) == recurrence_gate",
            result=Part.RECURRENCE_GATE,
            inputs=(Part.RECURRENCE_GATE_PRE,),
            function=lambda _layer, x: 1 / (1 + torch.exp(-x)),
        ),
        Rule(
            text="-8 softplus(L) recurrence_gate == log_decay",
            result=Part.LOG_DECAY,
            inputs=(Part.RECURRENCE_GATE,),
            function=_log_decay,
        ),
        Rule(
            text="exp(log_decay) == decay",
            result=Part.DECAY,
            inputs=(Part.LOG_DECAY,),
            function=lambda _layer, x: torch.exp(x),
        ),
        Rule(
            text="gelu(output_gate_pre) == output_gate",
            result=Part.OUTPUT_GATE,
            inputs=(Part.OUTPUT_GATE_PRE,),
            function=lambda _layer, x: F.gelu(x, approximate="tanh"),
        ),
        Rule(
            text="hidden * output_gate == mixer_out",
            result=Part.MIXER_OUT,
            inputs=(Part.HIDDEN, Part.OUTPUT_GATE),
            function=lambda _layer, hidden, gate: hidden * gate,
        ),
        Rule(
            text="mixer_out @ W_mixer + b == attn_out",
            result=Part.ATTN_OUT,
            inputs=(Part.MIXER_OUT,),
            function=lambda layer, x: (
                layer.temporal_block.linear_out.bias + x @ layer.temporal_block.linear_out.weight.T
            ),
        ),
        Rule(text="c tanh(logits_pre / c) == logits", result=Part.LOGITS, inputs=(Part.LOGITS_PRE,), function=_capped),
    ),
    tiny={"recurrent-gemma": Tiny(config="RecurrentGemmaConfig", model="RecurrentGemmaForCausalLM", fields=_fields)},
    left_padding=False,
    act=f"{MLP}.act_fn",
    down=f"{MLP}.down_proj",
    out=f"{MIX}.o_proj",
)
