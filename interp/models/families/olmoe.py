"""OLMoE: pre-norm blocks, queries and keys normed over all heads at once, a mixture of many small experts.

The weights of the chosen experts do not sum to 1 unless the config says `norm_topk_prob`.
"""

from collections.abc import Mapping
from typing import Any

from interp.models.experts import GATE_RULE, SOFTMAX_RULE, SUM_RULE, router_parts, router_weights, sizes
from interp.models.families.llama import BLOCK, llama_fields
from interp.models.families.mixtral import ENDS_AND_ATTENTION, MLP, WITHOUT_MLP
from interp.models.families.olmo2 import WIDE_NORMED
from interp.models.family import Family, Tiny


def _fields(of: Mapping[str, int]) -> dict[str, Any]:
    return llama_fields(of, num_experts=8, num_experts_per_tok=3)


FAMILY = Family(
    name="olmoe",
    model_types=("olmoe",),
    blocks="model.layers",
    parts={**WITHOUT_MLP, **WIDE_NORMED, **router_parts(MLP)},
    weights={**ENDS_AND_ATTENTION, **router_weights(MLP)},
    sizes=sizes(MLP),
    rules=(SUM_RULE, SOFTMAX_RULE, GATE_RULE),
    tiny={"olmoe": Tiny(config="OlmoeConfig", model="OlmoeForCausalLM", fields=_fields)},
    out=f"{BLOCK}.self_attn.o_proj",
)
