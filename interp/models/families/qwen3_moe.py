"""Qwen 3 MoE: Qwen 3's attention with a mixture of experts, none of them shared. Layers may be dense."""

from collections.abc import Mapping
from typing import Any

from interp.models.experts import GATE_RULE, SOFTMAX_RULE, SUM_RULE, router_parts, router_weights, sizes
from interp.models.families.llama import BLOCK, BLOCK_PARTS, WEIGHTS, llama_fields
from interp.models.families.mixtral import DENSE, MLP
from interp.models.families.qwen3 import NORMED
from interp.models.family import Family, Tiny


def _fields(of: Mapping[str, int]) -> dict[str, Any]:
    return llama_fields(
        of, head_dim=of["d_head"], num_experts=6, num_experts_per_tok=3, moe_intermediate_size=16, norm_topk_prob=True,
        mlp_only_layers=[0],
    )  # fmt: skip


FAMILY = Family(
    name="qwen3-moe",
    model_types=("qwen3_moe", "mellum"),
    blocks="model.layers",
    parts={**BLOCK_PARTS, **NORMED, **router_parts(MLP)},
    weights={**WEIGHTS, **router_weights(MLP)},
    optional=frozenset(DENSE),
    sizes=sizes(MLP),
    rules=(SUM_RULE, SOFTMAX_RULE, GATE_RULE),
    tiny={"qwen3-moe": Tiny(config="Qwen3MoeConfig", model="Qwen3MoeForCausalLM", fields=_fields)},
    act=f"{MLP}.act_fn",
    down=f"{MLP}.down_proj",
    out=f"{BLOCK}.self_attn.o_proj",
)
