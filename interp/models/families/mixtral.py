"""Mixtral: Llama's attention, and in place of each MLP a mixture of SwiGLU experts whose weights sum to 1.

There are no `gate_pre` and `neurons` of a whole layer: see `expert_gate_pre` and the other sites of experts.
"""

from collections.abc import Mapping
from typing import Any

from interp.core.sites import Part
from interp.models.experts import GATE_RULE, SOFTMAX_RULE, SUM_RULE, router_parts, router_weights, sizes
from interp.models.families.llama import BLOCK, BLOCK_PARTS, WEIGHTS, llama_fields
from interp.models.family import Family, Tiny

MLP = f"{BLOCK}.mlp"
DENSE = (Part.GATE_PRE, Part.GATE, Part.UP, Part.NEURONS)
WITHOUT_MLP = {part: reach for part, reach in BLOCK_PARTS.items() if part not in DENSE}
ENDS_AND_ATTENTION = {name: weight for name, weight in WEIGHTS.items() if name not in ("W_gate", "W_up", "W_down")}


def _fields(of: Mapping[str, int]) -> dict[str, Any]:
    return llama_fields(of, num_local_experts=6, num_experts_per_tok=2)


FAMILY = Family(
    name="mixtral",
    model_types=("mixtral",),
    blocks="model.layers",
    parts={**WITHOUT_MLP, **router_parts(MLP)},
    weights={**ENDS_AND_ATTENTION, **router_weights(MLP)},
    sizes=sizes(MLP),
    rules=(SUM_RULE, SOFTMAX_RULE, GATE_RULE),
    tiny={"mixtral": Tiny(config="MixtralConfig", model="MixtralForCausalLM", fields=_fields)},
    out=f"{BLOCK}.self_attn.o_proj",
)
