"""Llama: pre-norm blocks, rotary grouped-query attention, SwiGLU MLP. Several others share the layout.

Any `hidden_act` serves: GeGLU, ReGLU, relu2, and `linear` for a bilinear MLP, where `gate` equals `gate_pre`. Gemma 1
scales its embeddings inside the embedding module, so `embed` is the scaled value.
"""

from collections.abc import Mapping
from typing import Any

from interp.core.sites import Part
from interp.models.family import Family, Reach, Tiny, Weight

BLOCK = "model.layers.{layer}"

ATTENTION = {
    Part.RESID_PRE: Reach(path=BLOCK, side="input"),
    Part.ATTN_IN: Reach(path=f"{BLOCK}.input_layernorm"),
    Part.Q: Reach(path=f"{BLOCK}.self_attn.q_proj", heads="n_heads"),
    Part.K: Reach(path=f"{BLOCK}.self_attn.k_proj", heads="n_kv_heads"),
    Part.V: Reach(path=f"{BLOCK}.self_attn.v_proj", heads="n_kv_heads"),
    Part.ATTN_SCORES: Reach(path=f"{BLOCK}.self_attn", side="attention"),
    Part.PATTERN: Reach(path=f"{BLOCK}.self_attn", side="attention"),
    Part.Z: Reach(path=f"{BLOCK}.self_attn.o_proj", side="input", heads="n_heads"),
    Part.RESID_POST: Reach(path=BLOCK),
}
MLP = {
    Part.GATE_PRE: Reach(path=f"{BLOCK}.mlp.gate_proj"),
    Part.GATE: Reach(path=f"{BLOCK}.mlp.act_fn"),
    Part.UP: Reach(path=f"{BLOCK}.mlp.up_proj"),
    Part.NEURONS: Reach(path=f"{BLOCK}.mlp.down_proj", side="input"),
}
ENDS = {
    Part.EMBED: Reach(path="model.embed_tokens"),
    Part.FINAL_NORM: Reach(path="model.norm"),
    Part.LOGITS: Reach(path="lm_head"),
}
WEIGHTS = {
    "W_E": Weight(path="model.embed_tokens.weight", transpose=False),
    "W_Q": Weight(path=f"{BLOCK}.self_attn.q_proj.weight"),
    "W_K": Weight(path=f"{BLOCK}.self_attn.k_proj.weight"),
    "W_V": Weight(path=f"{BLOCK}.self_attn.v_proj.weight"),
    "W_O": Weight(path=f"{BLOCK}.self_attn.o_proj.weight", heads="n_heads"),
    "W_gate": Weight(path=f"{BLOCK}.mlp.gate_proj.weight"),
    "W_up": Weight(path=f"{BLOCK}.mlp.up_proj.weight"),
    "W_down": Weight(path=f"{BLOCK}.mlp.down_proj.weight"),
    "W_U": Weight(path="lm_head.weight"),
}


BLOCK_PARTS = {
    **ENDS,
    **ATTENTION,
    **MLP,
    Part.ATTN_OUT: Reach(path=f"{BLOCK}.self_attn"),
    Part.RESID_MID: Reach(path=f"{BLOCK}.post_attention_layernorm", side="input", carry=BLOCK),
    Part.MLP_IN: Reach(path=f"{BLOCK}.post_attention_layernorm"),
    Part.MLP_OUT: Reach(path=f"{BLOCK}.mlp"),
}


def llama_fields(sizes: Mapping[str, int], **more: Any) -> dict[str, Any]:
    """Config fields of a tiny model, by the names that most configs use."""
    return {
        "vocab_size": sizes["d_vocab"],
        "hidden_size": sizes["d_model"],
        "intermediate_size": sizes["d_mlp"],
        "num_hidden_layers": sizes["n_layers"],
        "num_attention_heads": sizes["n_heads"],
        "num_key_value_heads": sizes["n_kv_heads"],
        "max_position_embeddings": sizes["n_ctx"],
        "tie_word_embeddings": False,
        **more,
    }


def _gemma_fields(sizes: Mapping[str, int]) -> dict[str, Any]:
    return llama_fields(sizes, head_dim=sizes["d_head"], tie_word_embeddings=True)


FAMILY = Family(
    name="llama",
    model_types=(
        "llama",
        "mistral",
        "qwen2",
        "gemma",
        "smollm3",
        "seed_oss",
        "helium",
        "ministral",
        "ministral3",
        "cwm",
        "ernie4_5",
    ),
    blocks="model.layers",
    parts=BLOCK_PARTS,
    weights=WEIGHTS,
    tiny={
        "llama": Tiny(config="LlamaConfig", model="LlamaForCausalLM", fields=llama_fields),
        "mistral": Tiny(config="MistralConfig", model="MistralForCausalLM", fields=llama_fields),
        "qwen2": Tiny(config="Qwen2Config", model="Qwen2ForCausalLM", fields=llama_fields),
        "gemma": Tiny(config="GemmaConfig", model="GemmaForCausalLM", fields=_gemma_fields),
    },
    act=f"{BLOCK}.mlp.act_fn",
    down=f"{BLOCK}.mlp.down_proj",
    out=f"{BLOCK}.self_attn.o_proj",
)
