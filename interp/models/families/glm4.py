"""GLM 4 (0414): norms before and after each sublayer, under names of its own; fused gate and up projection."""

from collections.abc import Mapping
from typing import Any

from interp.core.sites import Part
from interp.models.families.llama import ATTENTION, BLOCK, ENDS, MLP, WEIGHTS, llama_fields
from interp.models.families.phi3 import FUSED, FUSED_WEIGHTS
from interp.models.family import Family, Reach, Tiny


def _fields(sizes: Mapping[str, int]) -> dict[str, Any]:
    return llama_fields(sizes, head_dim=sizes["d_head"])


FAMILY = Family(
    name="glm4",
    model_types=("glm4",),
    blocks="model.layers",
    parts={
        **ENDS,
        **ATTENTION,
        **MLP,
        **FUSED,
        Part.ATTN_OUT: Reach(path=f"{BLOCK}.post_self_attn_layernorm"),
        Part.RESID_MID: Reach(path=f"{BLOCK}.post_attention_layernorm", side="input", carry=BLOCK),
        Part.MLP_IN: Reach(path=f"{BLOCK}.post_attention_layernorm"),
        Part.MLP_OUT: Reach(path=f"{BLOCK}.post_mlp_layernorm"),
    },
    weights={**WEIGHTS, **FUSED_WEIGHTS},
    tiny={"glm4": Tiny(config="Glm4Config", model="Glm4ForCausalLM", fields=_fields)},
    act=f"{BLOCK}.mlp.activation_fn",
    down=f"{BLOCK}.mlp.down_proj",
    out=f"{BLOCK}.self_attn.o_proj",
    after_attn=f"{BLOCK}.post_self_attn_layernorm",
    after_mlp=f"{BLOCK}.post_mlp_layernorm",
)
