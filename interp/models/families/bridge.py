"""TransformerBridge (TransformerLens 3 and later) around a Llama-shaped model.

The bridge keeps the wrapped modules under `_original_component` and puts hook points, which are modules, around them.
It runs its own attention, so patterns come from its hook points. Bridges around other architectures get module paths.
"""

from interp.core.sites import Part
from interp.models.family import Family, Reach, Weight

BLOCK = "blocks.{layer}"
INNER = f"{BLOCK}._original_component"
ATTN = f"{INNER}.self_attn"
MLP = f"{INNER}.mlp._original_component"

FAMILY = Family(
    name="bridge-llama",
    model_types=("TransformerBridge",),
    blocks="blocks",
    parts={
        Part.EMBED: Reach(path="embed.hook_out"),
        Part.RESID_PRE: Reach(path=f"{BLOCK}.hook_in"),
        Part.ATTN_IN: Reach(path=f"{INNER}.input_layernorm.hook_out"),
        Part.Q: Reach(path=f"{ATTN}._original_component.q_proj.hook_out", heads="n_heads"),
        Part.K: Reach(path=f"{ATTN}._original_component.k_proj.hook_out", heads="n_kv_heads"),
        Part.V: Reach(path=f"{ATTN}._original_component.v_proj.hook_out", heads="n_kv_heads"),
        Part.ATTN_SCORES: Reach(path=f"{ATTN}.hook_attn_scores"),
        Part.PATTERN: Reach(path=f"{ATTN}.hook_pattern"),
        Part.Z: Reach(path=f"{ATTN}._original_component.o_proj.hook_in", heads="n_heads"),
        Part.ATTN_OUT: Reach(path=f"{ATTN}.hook_out"),
        Part.RESID_MID: Reach(path=f"{INNER}.post_attention_layernorm.hook_in", carry=BLOCK),
        Part.MLP_IN: Reach(path=f"{INNER}.post_attention_layernorm.hook_out"),
        Part.GATE_PRE: Reach(path=f"{MLP}.gate_proj.hook_out"),
        Part.UP: Reach(path=f"{MLP}.up_proj.hook_out"),
        Part.NEURONS: Reach(path=f"{MLP}.down_proj.hook_in"),
        Part.MLP_OUT: Reach(path=f"{INNER}.mlp.hook_out"),
        Part.RESID_POST: Reach(path=f"{BLOCK}.hook_out"),
        Part.LOGITS: Reach(path="unembed.hook_out"),
    },
    weights={
        "W_E": Weight(path="embed._original_component.weight", transpose=False),
        "W_V": Weight(path=f"{ATTN}._original_component.v_proj._original_component.weight"),
        "W_O": Weight(path=f"{ATTN}._original_component.o_proj._original_component.weight", heads="n_heads"),
        "W_gate": Weight(path=f"{MLP}.gate_proj._original_component.weight"),
        "W_up": Weight(path=f"{MLP}.up_proj._original_component.weight"),
        "W_down": Weight(path=f"{MLP}.down_proj._original_component.weight"),
        "W_U": Weight(path="unembed._original_component.weight"),
    },
)
