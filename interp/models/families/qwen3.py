"""Qwen 3: Llama's layout with queries and keys normed head by head, read after their norm and before the rotary."""

from collections.abc import Mapping
from typing import Any

from interp.core.sites import Part
from interp.models.families.llama import BLOCK, BLOCK_PARTS, WEIGHTS, llama_fields
from interp.models.family import Family, Reach, Tiny

NORMED = {
    Part.Q: Reach(path=f"{BLOCK}.self_attn.q_norm"),
    Part.K: Reach(path=f"{BLOCK}.self_attn.k_norm"),
}


def _fields(sizes: Mapping[str, int]) -> dict[str, Any]:
    return llama_fields(sizes, head_dim=sizes["d_head"])


FAMILY = Family(
    name="qwen3",
    model_types=("qwen3",),
    blocks="model.layers",
    parts={**BLOCK_PARTS, **NORMED},
    weights=WEIGHTS,
    tiny={"qwen3": Tiny(config="Qwen3Config", model="Qwen3ForCausalLM", fields=_fields)},
    act=f"{BLOCK}.mlp.act_fn",
    down=f"{BLOCK}.mlp.down_proj",
    out=f"{BLOCK}.self_attn.o_proj",
)
