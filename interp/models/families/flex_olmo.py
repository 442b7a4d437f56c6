"""FlexOlmo: OLMo 2's blocks with OLMoE's mixture of experts in place of each MLP."""

from dataclasses import replace

from interp.models.experts import GATE_RULE, SOFTMAX_RULE, SUM_RULE, router_parts, router_weights, sizes
from interp.models.families import olmo2
from interp.models.families.mixtral import DENSE, ENDS_AND_ATTENTION, MLP

FAMILY = replace(
    olmo2.FAMILY,
    name="flex-olmo",
    model_types=("flex_olmo",),
    parts={part: reach for part, reach in olmo2.FAMILY.parts.items() if part not in DENSE} | router_parts(MLP),
    weights={**ENDS_AND_ATTENTION, **router_weights(MLP)},
    sizes=sizes(MLP),
    rules=(SUM_RULE, SOFTMAX_RULE, GATE_RULE),
    tiny={},
    act=None,
    down=None,
)
