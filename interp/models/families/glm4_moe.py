"""GLM 4.5 and relatives: grouped-query attention, first layers dense, then DeepSeek V3's mixture with shared experts.

Some norm queries and keys head by head, some do not: `q` is what enters the rotary embedding either way.
"""

from collections.abc import Mapping
from typing import Any

from interp.core.sites import Part
from interp.models.experts import (
    GATE_RULE,
    SHARED_RULE,
    SIGMOID_RULE,
    SUM_RULE,
    router_parts,
    router_weights,
    shared_parts,
    shared_weights,
    sizes,
)
from interp.models.families.deepseek_v3 import SHARED
from interp.models.families.llama import BLOCK, BLOCK_PARTS, WEIGHTS, llama_fields
from interp.models.families.mixtral import DENSE, MLP
from interp.models.family import Family, Reach, Tiny

ATTN = f"{BLOCK}.self_attn"


def _fields(of: Mapping[str, int]) -> dict[str, Any]:
    return llama_fields(
        of, head_dim=of["d_head"], n_routed_experts=8, num_experts_per_tok=3, n_group=2, topk_group=1,
        moe_intermediate_size=16, n_shared_experts=1, first_k_dense_replace=1, use_qk_norm=True,
    )  # fmt: skip


FAMILY = Family(
    name="glm4-moe",
    model_types=("glm4_moe", "dots1", "solar_open"),
    blocks="model.layers",
    parts={
        **BLOCK_PARTS,
        Part.Q: (Reach(path=f"{ATTN}.q_norm"), Reach(path=f"{ATTN}.q_proj", heads="n_heads")),
        Part.K: (Reach(path=f"{ATTN}.k_norm"), Reach(path=f"{ATTN}.k_proj", heads="n_kv_heads")),
        **router_parts(MLP),
        **shared_parts(SHARED, flat=False),
    },
    weights={**WEIGHTS, **router_weights(MLP), **shared_weights(SHARED)},
    optional=frozenset(DENSE),
    sizes=sizes(MLP, shared=SHARED),
    rules=(SUM_RULE, SIGMOID_RULE, GATE_RULE, SHARED_RULE),
    tiny={"glm4-moe": Tiny(config="Glm4MoeConfig", model="Glm4MoeForCausalLM", fields=_fields)},
    act=f"{MLP}.act_fn",
    down=f"{MLP}.down_proj",
    out=f"{ATTN}.o_proj",
)
