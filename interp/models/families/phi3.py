"""Phi 3: Llama's layout with one fused projection for queries, keys and values, and one for gate and up."""

from interp.core.sites import Part
from interp.models.families.llama import BLOCK, BLOCK_PARTS, WEIGHTS, llama_fields
from interp.models.family import Family, Reach, Tiny, Weight

SHARES = ("n_heads", "n_kv_heads", "n_kv_heads")
FUSED = {
    Part.GATE_PRE: Reach(path=f"{BLOCK}.mlp.gate_up_proj", chunk=(0, 2)),
    Part.GATE: Reach(path=f"{BLOCK}.mlp.activation_fn"),
    Part.UP: Reach(path=f"{BLOCK}.mlp.gate_up_proj", chunk=(1, 2)),
}
FUSED_WEIGHTS = {
    "W_gate": Weight(path=f"{BLOCK}.mlp.gate_up_proj.weight", chunk=(0, 2)),
    "W_up": Weight(path=f"{BLOCK}.mlp.gate_up_proj.weight", chunk=(1, 2)),
}

FAMILY = Family(
    name="phi3",
    model_types=("phi3",),
    blocks="model.layers",
    parts={
        **BLOCK_PARTS,
        **FUSED,
        Part.Q: Reach(path=f"{BLOCK}.self_attn.qkv_proj", chunk=(0, SHARES), heads="n_heads"),
        Part.K: Reach(path=f"{BLOCK}.self_attn.qkv_proj", chunk=(1, SHARES), heads="n_kv_heads"),
        Part.V: Reach(path=f"{BLOCK}.self_attn.qkv_proj", chunk=(2, SHARES), heads="n_kv_heads"),
    },
    weights={
        **WEIGHTS,
        **FUSED_WEIGHTS,
        "W_Q": Weight(path=f"{BLOCK}.self_attn.qkv_proj.weight", chunk=(0, SHARES)),
        "W_K": Weight(path=f"{BLOCK}.self_attn.qkv_proj.weight", chunk=(1, SHARES)),
        "W_V": Weight(path=f"{BLOCK}.self_attn.qkv_proj.weight", chunk=(2, SHARES)),
    },
    tiny={"phi3": Tiny(config="Phi3Config", model="Phi3ForCausalLM", fields=llama_fields)},
    act=f"{BLOCK}.mlp.activation_fn",
    down=f"{BLOCK}.mlp.down_proj",
    out=f"{BLOCK}.self_attn.o_proj",
)
