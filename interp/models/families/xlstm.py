"""xLSTM (mLSTM blocks): a matrix state with an exponential input gate and a forget gate per head; SwiGLU MLPs.

    i, f = c tanh((W attn_in + b) / c);  m' = max(log sigmoid(f) + m, i)
    C' = sigmoid(f) e^{m - m'} C + e^{i - m'} k v^T;  n' likewise with k;  h = C' q / (max(|n' q|, e^{-m'}) + eps)
    mixer_out = sigmoid(output_gate_pre) * norm(h);  q is scaled by 1 / sqrt(d)

Sites: `input_gate_pre` i and `forget_gate_pre` f, after their soft cap c: the gates are exp(i) and sigmoid(f), and the
backend uses them in logarithms, so no tensor holds them. `q`, `k`, `v`, `hidden` h, `readout` norm(h),
`output_gate_pre`, `output_gate`, `mixer_out`. Both `weight_mode`s serve. `logits_pre` are before the soft cap.

Source: transformers 5.23 (its own code, for where the package xlstm is not installed); Beck et al., arXiv 2405.04517.
Traps: the cache has room for key and value widths rounded up to 64, so a model whose widths (qk_dim_factor and
v_dim_factor times hidden_size) are no multiples of 64 cannot decode with one. Texts longer than
`max_inference_chunksize` run piece by piece, and every site fires for each piece. A model cast to half precision does
not run in this code (its gates are float32, its values are not), nor can `weight_mode="fused"` be built from a config.
There is no mask: padding on the left is refused.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from interp.core.sites import Part
from interp.models.family import Family, Reach, Rule, Tiny, Weight
from interp.models.linear_views import CHANNELS_FIRST

BLOCK = "backbone.blocks.{layer}"
MIX = f"{BLOCK}.mlstm_layer"
BACKEND = f"{MIX}.mlstm_backend"
MLP = f"{BLOCK}.ffn"
HEADS = ("batch", "pos", "mix_head", "d_state")
VALUES = ("batch", "pos", "mix_head", "d_head_value")
GATES = ("batch", "pos", "mix_head")
INNER = ("batch", "pos", "d_inner")


def _fields(of: Mapping[str, int]) -> dict[str, Any]:
    return {
        "vocab_size": of["d_vocab"], "hidden_size": of["d_model"], "embedding_dim": of["d_model"],
        "num_hidden_layers": of["n_layers"], "num_blocks": of["n_layers"], "num_heads": of["n_heads"],
        "qk_dim_factor": 64 / of["d_model"], "v_dim_factor": 128 / of["d_model"], "chunk_size": 4,
        "ffn_round_up_to_multiple_of": 4, "gate_soft_cap": 5.0,
    }  # fmt: skip


def _gate(name: str, number: int) -> Any:
    def gate(layer: Any, x: Tensor) -> Tensor:
        mix = layer.mlstm_layer
        fused = mix.config.weight_mode == "fused"
        before = mix.ifgate_preact(x).chunk(2, dim=-1)[number] if fused else getattr(mix, name)(x)
        return mix.config.gate_soft_cap * torch.tanh(before / mix.config.gate_soft_cap)

    return gate


def _normed(layer: Any, hidden: Tensor) -> Tensor:
    """Layer norm head by head."""
    norm = layer.mlstm_layer.multihead_norm
    y = hidden - hidden.mean(-1, keepdim=True)
    y = y / (y.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    return y.flatten(-2) * norm.weight + (0 if norm.bias is None else norm.bias)


def _capped(model: Any, logits: Tensor) -> Tensor:
    cap = model.config.output_logit_soft_cap
    return cap * torch.tanh(logits.float() / cap)


def _argument(name: str, axes: tuple[str, ...]) -> Reach:
    return Reach(path=BACKEND, side="input", item=name, head_major=True, axes=axes)


FAMILY = Family(
    name="xlstm",
    model_types=("xlstm",),
    blocks="backbone.blocks",
    parts={
        Part.EMBED: Reach(path="backbone.embeddings"),
        Part.RESID_PRE: Reach(path=BLOCK, side="input"),
        Part.ATTN_IN: Reach(path=f"{BLOCK}.norm_mlstm"),
        Part.Q: _argument("query", HEADS),
        Part.K: _argument("key", HEADS),
        Part.V: _argument("value", VALUES),
        Part.INPUT_GATE_PRE: Reach(path=BACKEND, side="input", item="igate", view=CHANNELS_FIRST, axes=GATES),
        Part.FORGET_GATE_PRE: Reach(path=BACKEND, side="input", item="fgate", view=CHANNELS_FIRST, axes=GATES),
        Part.HIDDEN: Reach(path=BACKEND, head_major=True, axes=VALUES),
        Part.READOUT: Reach(path=f"{MIX}.multihead_norm", axes=INNER),
        Part.OUTPUT_GATE_PRE: Reach(path=f"{MIX}.ogate_act_fn", side="input", axes=INNER),
        Part.OUTPUT_GATE: Reach(path=f"{MIX}.ogate_act_fn", axes=INNER),
        Part.MIXER_OUT: Reach(path=f"{MIX}.out_proj", side="input"),
        Part.ATTN_OUT: Reach(path=MIX),
        Part.RESID_MID: Reach(path=f"{BLOCK}.norm_ffn", side="input", carry=BLOCK),
        Part.MLP_IN: Reach(path=f"{BLOCK}.norm_ffn"),
        Part.GATE_PRE: (Reach(path=f"{MLP}.proj_up_gate"), Reach(path=f"{MLP}.proj_up_gate_z", chunk=(0, 2))),
        Part.GATE: Reach(path=f"{MLP}.act_fn"),
        Part.UP: (Reach(path=f"{MLP}.proj_up"), Reach(path=f"{MLP}.proj_up_gate_z", chunk=(1, 2))),
        Part.NEURONS: Reach(path=f"{MLP}.proj_down", side="input"),
        Part.MLP_OUT: Reach(path=MLP),
        Part.RESID_POST: Reach(path=BLOCK),
        Part.FINAL_NORM: Reach(path="backbone.out_norm"),
        Part.LOGITS_PRE: Reach(path="lm_head"),
        Part.LOGITS: Reach(path="", item="logits"),
    },
    weights={
        "W_E": Weight(path="backbone.embeddings.weight", transpose=False),
        "W_gate": (
            Weight(path=f"{MLP}.proj_up_gate.weight"),
            Weight(path=f"{MLP}.proj_up_gate_z.weight", chunk=(0, 2)),
        ),
        "W_up": (Weight(path=f"{MLP}.proj_up.weight"), Weight(path=f"{MLP}.proj_up_gate_z.weight", chunk=(1, 2))),
        "W_down": Weight(path=f"{MLP}.proj_down.weight"),
        "W_mixer": Weight(path=f"{MIX}.out_proj.weight"),
        "W_U": Weight(path="lm_head.weight"),
    },
    sizes={"mix_head": f"{MIX}.config.num_heads", "d_inner": f"{MIX}.v_dim"},
    rules=(
        *(
            Rule(
                text=f"c tanh((attn_in @ W + b) / c) == {part}",
                result=part,
                inputs=(Part.ATTN_IN,),
                function=_gate(name, number),
            )
            for part, name, number in (
                (Part.INPUT_GATE_PRE, "igate_preact", 0),
                (Part.FORGET_GATE_PRE, "fgate_preact", 1),
            )
        ),
        Rule(
            text="1 / (1 + exp(-output_gate_pre)) == output_gate",
            result=Part.OUTPUT_GATE,
            inputs=(Part.OUTPUT_GATE_PRE,),
            function=lambda _layer, x: 1 / (1 + torch.exp(-x)),
        ),
        Rule(text="norm(hidden) == readout", result=Part.READOUT, inputs=(Part.HIDDEN,), function=_normed),
        Rule(
            text="output_gate * readout == mixer_out",
            result=Part.MIXER_OUT,
            inputs=(Part.OUTPUT_GATE, Part.READOUT),
            function=lambda _layer, gate, x: gate * x,
        ),
        Rule(
            text="mixer_out @ W_mixer == attn_out",
            result=Part.ATTN_OUT,
            inputs=(Part.MIXER_OUT,),
            function=lambda layer, x: layer.mlstm_layer.out_proj(x),
        ),
        Rule(text="c tanh(logits_pre / c) == logits", result=Part.LOGITS, inputs=(Part.LOGITS_PRE,), function=_capped),
    ),
    left_padding=False,
    tiny={"xlstm": Tiny(config="xLSTMConfig", model="xLSTMForCausalLM", fields=_fields)},
    act=f"{MLP}.act_fn",
    down=f"{MLP}.proj_down",
)
