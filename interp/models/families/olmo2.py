"""OLMo 2 and 3: norms after each sublayer and none before, queries and keys normed over all heads at once.

A sublayer reads the stream itself: `attn_in` equals `resid_pre` and `mlp_in` equals `resid_mid` unless one is edited.
An edit of `attn_in` or `mlp_in` moves only what the sublayer reads.
"""

from interp.core.sites import Part
from interp.models.families.llama import ATTENTION, BLOCK, ENDS, MLP, WEIGHTS, llama_fields
from interp.models.family import Family, Reach, Tiny

WIDE_NORMED = {
    Part.Q: Reach(path=f"{BLOCK}.self_attn.q_norm", heads="n_heads"),
    Part.K: Reach(path=f"{BLOCK}.self_attn.k_norm", heads="n_kv_heads"),
}

FAMILY = Family(
    name="olmo2",
    model_types=("olmo2", "olmo3"),
    blocks="model.layers",
    parts={
        **ENDS,
        **ATTENTION,
        **MLP,
        **WIDE_NORMED,
        Part.ATTN_IN: Reach(path=f"{BLOCK}.self_attn", side="input", item="hidden_states"),
        Part.ATTN_OUT: Reach(path=f"{BLOCK}.post_attention_layernorm"),
        Part.RESID_MID: Reach(path=f"{BLOCK}.mlp", side="input", carry=BLOCK),
        Part.MLP_IN: Reach(path=f"{BLOCK}.mlp", side="input"),
        Part.MLP_OUT: Reach(path=f"{BLOCK}.post_feedforward_layernorm"),
    },
    weights=WEIGHTS,
    tiny={"olmo2": Tiny(config="Olmo2Config", model="Olmo2ForCausalLM", fields=llama_fields)},
    act=f"{BLOCK}.mlp.act_fn",
    down=f"{BLOCK}.mlp.down_proj",
    out=f"{BLOCK}.self_attn.o_proj",
    after_attn=f"{BLOCK}.post_attention_layernorm",
    after_mlp=f"{BLOCK}.post_feedforward_layernorm",
)
