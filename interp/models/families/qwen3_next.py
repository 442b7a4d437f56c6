"""Qwen 3 Next: gated DeltaNet in most layers, gated attention in the others, a mixture of experts after each.

Gated attention: mixer = sigmoid(attn_gate_pre) * pattern @ v. `q` is after its norm, `attn_gate_pre` is the second half
of each head's part of q_proj. `z`, the input of o_proj, is the gated value.

Gated DeltaNet, per value head, with keys and queries of length 1 (the latter over sqrt(d)):

    q, k, v = silu(conv(conv_in));  beta = sigmoid(b);  g = -exp(A_log) softplus(a + dt_bias)
    S' = e^g S;  S = S' + k beta (v - S'^T k)^T;  mixer_out = norm(S^T q) * silu(output_gate_pre)

Sites: `conv_in`, `q`, `k`, `v` (after the convolution, before they are normed), `write_gate_pre` b, `write_gate` beta,
`decay_pre` a + dt_bias, `log_decay` g, `readout` S^T q, `output_gate_pre`, `output_gate`, `mixer_out`. The decay is
exp(log_decay), of which the chunked kernel only forms sums. Heads of the two kinds of layer differ in number and width.

Source: transformers 5.23; Yang et al., arXiv 2412.06464; the Qwen 3 Next release. Traps: where the kernels of
flash-linear-attention are installed, `log_decay` is inside a fused call and does not fire, nor do `q`, `k` and `v` with
those of causal_conv1d: load with kernels off. There is no W_Q: q_proj holds queries and gates head by head. Padding
reaches the recurrence as zeros.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from interp.core.sites import Part
from interp.models.experts import (
    GATE_RULE,
    SOFTMAX_RULE,
    SUM_RULE,
    router_parts,
    router_weights,
    shared_parts,
    shared_weights,
    sizes,
)  # fmt: skip
from interp.models.families.llama import BLOCK, BLOCK_PARTS, WEIGHTS, llama_fields
from interp.models.families.mixtral import DENSE, MLP
from interp.models.families.qwen2_moe import GATED_SHARED_RULES, SHARED, SHARED_WEIGHT
from interp.models.families.qwen3 import NORMED
from interp.models.family import Family, Reach, Rule, Tiny, Weight
from interp.models.linear_delta import DELTA_RULES, FUSED_RULES, delta_parts, delta_sizes

ATTN, DELTA = f"{BLOCK}.self_attn", f"{BLOCK}.linear_attn"


def _fields(of: Mapping[str, int]) -> dict[str, Any]:
    return llama_fields(
        of, head_dim=of["d_head"], num_experts=6, num_experts_per_tok=2, moe_intermediate_size=12,
        shared_expert_intermediate_size=20, mlp_only_layers=[0], layer_types=layer_types(of["n_layers"]),
        linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=6, linear_value_head_dim=8,
    )  # fmt: skip


def layer_types(n_layers: int) -> list[str]:
    """Every second layer has attention, where real models have one in four."""
    return ["full_attention" if i % 2 else "linear_attention" for i in range(n_layers)]


def _gate_pre(layer: Any, x: Tensor) -> Tensor:
    """Head by head: queries first, then gates."""
    attention = layer.self_attn
    rows = attention.q_proj.weight.unflatten(0, (-1, 2, attention.head_dim))[:, 1]
    return torch.einsum("btd,hed->bthe", x, rows)


def _queries(layer: Any, x: Tensor) -> Tensor:
    attention = layer.self_attn
    rows = attention.q_proj.weight.unflatten(0, (-1, 2, attention.head_dim))[:, 0]
    return attention.q_norm(torch.einsum("btd,hed->bthe", x, rows))


GATED_ATTENTION = {
    Part.ATTN_GATE_PRE: Reach(path=f"{ATTN}.q_proj", heads="n_heads", chunk=(1, 2), within_heads=True),
    Part.ATTN_GATE: Reach(path=ATTN, side="op", op="sigmoid", heads="n_heads"),
}
ATTENTION_RULES = (
    Rule(
        text="attn_in @ W_attn_gate == attn_gate_pre",
        result=Part.ATTN_GATE_PRE,
        inputs=(Part.ATTN_IN,),
        function=_gate_pre,
    ),
    Rule(
        text="norm(attn_in @ W_Q) == q",
        result=Part.Q,
        inputs=(Part.ATTN_IN, Part.ATTN_GATE_PRE),
        function=lambda layer, x, _gate: _queries(layer, x),
    ),
    Rule(
        text="1 / (1 + exp(-attn_gate_pre)) == attn_gate",
        result=Part.ATTN_GATE,
        inputs=(Part.ATTN_GATE_PRE,),
        function=lambda _layer, before: 1 / (1 + torch.exp(-before)),
    ),
)

WITHOUT_W_Q = {name: weight for name, weight in WEIGHTS.items() if name != "W_Q"}
DELTA_PARTS = delta_parts(DELTA)
BOTH = {part: (reach, DELTA_PARTS[part]) for part, reach in {**BLOCK_PARTS, **NORMED}.items() if part in DELTA_PARTS}
MIXERS = {
    **BLOCK_PARTS,
    **NORMED,
    **DELTA_PARTS,
    **BOTH,
    **GATED_ATTENTION,
    Part.ATTN_OUT: (Reach(path=ATTN), Reach(path=DELTA)),
}
MIXTURE = {**router_parts(MLP), **shared_parts(SHARED, flat=True), **SHARED_WEIGHT}

FAMILY = Family(
    name="qwen3-next",
    model_types=("qwen3_next",),
    blocks="model.layers",
    parts={**MIXERS, **MIXTURE},
    weights={
        **WITHOUT_W_Q,
        **router_weights(MLP),
        **shared_weights(SHARED),
        "W_mixer": Weight(path=f"{DELTA}.out_proj.weight"),
    },
    optional=frozenset({*DENSE, *MIXTURE}),
    sizes={**sizes(MLP, shared=SHARED), **delta_sizes(DELTA)},
    rules=(
        *(SUM_RULE, SOFTMAX_RULE, GATE_RULE, *GATED_SHARED_RULES),
        *(*ATTENTION_RULES, *DELTA_RULES, *FUSED_RULES),
    ),
    tiny={"qwen3-next": Tiny(config="Qwen3NextConfig", model="Qwen3NextForCausalLM", fields=_fields)},
    act=f"{MLP}.act_fn",
    down=f"{MLP}.down_proj",
    out=f"{BLOCK}.self_attn.o_proj",
)
