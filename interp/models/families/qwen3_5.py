"""Qwen 3.5's language model: Qwen 3 Next's layout with separate projections in its DeltaNet layers, and dense MLPs.

See `qwen3_next` for the sites and traps. `conv_in`, `output_gate_pre` and `write_gate_pre` are modules' own outputs.
Source: transformers 5.23 (model type qwen3_5_text).
"""

from collections.abc import Mapping
from typing import Any

from interp.core.sites import Part
from interp.models.families.llama import BLOCK, llama_fields
from interp.models.families.qwen3_next import ATTENTION_RULES, DELTA, MIXERS, WITHOUT_W_Q, layer_types
from interp.models.family import Family, Reach, Rule, Tiny, Weight
from interp.models.linear_delta import DELTA_RULES, GATES, VALUES, delta_sizes

SPLIT = {
    Part.CONV_IN: Reach(path=f"{DELTA}.in_proj_qkv", axes=("batch", "pos", "d_conv")),
    Part.WRITE_GATE_PRE: Reach(path=f"{DELTA}.in_proj_b", axes=GATES),
    Part.OUTPUT_GATE_PRE: Reach(
        path=f"{DELTA}.norm", side="input", item=1, flat=True, folded="value_head", axes=VALUES
    ),
}


def _fields(of: Mapping[str, int]) -> dict[str, Any]:
    return llama_fields(
        of, head_dim=of["d_head"], layer_types=layer_types(of["n_layers"]),
        linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=6, linear_value_head_dim=8,
    )  # fmt: skip


FAMILY = Family(
    name="qwen3.5",
    model_types=("qwen3_5_text",),
    blocks="model.layers",
    parts={**MIXERS, **SPLIT},
    weights={
        **WITHOUT_W_Q,
        "W_mixer": Weight(path=f"{DELTA}.out_proj.weight"),
        "W_conv_in": Weight(path=f"{DELTA}.in_proj_qkv.weight"),
        "W_output_gate": Weight(path=f"{DELTA}.in_proj_z.weight"),
    },
    sizes=delta_sizes(DELTA),
    rules=(
        *ATTENTION_RULES,
        *DELTA_RULES,
        Rule(
            text="attn_in @ W_decay + dt_bias == decay_pre",
            result=Part.DECAY_PRE,
            inputs=(Part.ATTN_IN,),
            function=lambda layer, x: x @ layer.linear_attn.in_proj_a.weight.T + layer.linear_attn.dt_bias,
        ),
        Rule(
            text="attn_in @ W_output_gate == output_gate_pre",
            result=Part.OUTPUT_GATE_PRE,
            inputs=(Part.ATTN_IN,),
            function=lambda layer, x: (x @ layer.linear_attn.in_proj_z.weight.T).unflatten(
                -1, (-1, layer.linear_attn.head_v_dim)
            ),
        ),
    ),
    tiny={"qwen3.5": Tiny(config="Qwen3_5TextConfig", model="Qwen3_5ForCausalLM", fields=_fields)},
    act=f"{BLOCK}.mlp.act_fn",
    down=f"{BLOCK}.mlp.down_proj",
    out=f"{BLOCK}.self_attn.o_proj",
)
