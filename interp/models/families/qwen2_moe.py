"""Qwen 2 MoE: Llama's attention; routed experts, and a shared one behind a sigmoid gate. Layers may be dense."""

from collections.abc import Mapping
from typing import Any

import torch

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
from interp.models.family import Family, Reach, Rule, Tiny

SHARED = f"{MLP}.shared_expert"
SHARED_WEIGHT = {
    Part.SHARED_WEIGHT_PRE: Reach(path=f"{MLP}.shared_expert_gate", flat=True),
    Part.SHARED_WEIGHT: Reach(path=MLP, side="op", op="sigmoid", flat=True, needs=SHARED),
}


def _fields(of: Mapping[str, int]) -> dict[str, Any]:
    return llama_fields(
        of, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=24,
        mlp_only_layers=[0],
    )  # fmt: skip


def _sum(_layer: Any, routed: torch.Tensor, before: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    return routed + torch.sigmoid(before) * shared


def _weight(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(x @ layer.mlp.shared_expert_gate.weight.T)


GATED_SHARED_RULES = (
    Rule(
        text="routed_out + sigmoid(shared_weight_pre) * shared_out == mlp_out",
        result=Part.MLP_OUT,
        inputs=(Part.ROUTED_OUT, Part.SHARED_WEIGHT_PRE, Part.SHARED_OUT),
        function=_sum,
    ),
    Rule(
        text="sigmoid(mlp_in @ w) == shared_weight",
        result=Part.SHARED_WEIGHT,
        inputs=(Part.MLP_IN,),
        function=_weight,
    ),
)

FAMILY = Family(
    name="qwen2-moe",
    model_types=("qwen2_moe",),
    blocks="model.layers",
    parts={**BLOCK_PARTS, **router_parts(MLP), **shared_parts(SHARED, flat=True), **SHARED_WEIGHT},
    weights={**WEIGHTS, **router_weights(MLP), **shared_weights(SHARED)},
    optional=frozenset(DENSE),
    sizes=sizes(MLP, shared=SHARED),
    rules=(SUM_RULE, SOFTMAX_RULE, GATE_RULE, *GATED_SHARED_RULES),
    tiny={"qwen2-moe": Tiny(config="Qwen2MoeConfig", model="Qwen2MoeForCausalLM", fields=_fields)},
    act=f"{MLP}.act_fn",
    down=f"{MLP}.down_proj",
    out=f"{BLOCK}.self_attn.o_proj",
)
