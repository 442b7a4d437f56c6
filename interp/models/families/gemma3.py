"""Gemma 3 (text): GeGLU MLP, norms before and after each sublayer, queries and keys normed, sliding-window layers.

What a sublayer adds to the stream is the output of the norm after it, so `attn_out` and `mlp_out` are read there.
`q` and `k` are read after their norm and before the rotary embedding.
"""

from collections.abc import Mapping
from typing import Any

from interp.core.sites import Part
from interp.models.families.llama import ATTENTION, BLOCK, ENDS, MLP, WEIGHTS, llama_fields
from interp.models.family import Family, Reach, Tiny


def gemma_fields(sizes: Mapping[str, int]) -> dict[str, Any]:
    """Sliding-window layers below, full attention on top."""
    layers = ["sliding_attention"] * (sizes["n_layers"] - 1) + ["full_attention"]
    return llama_fields(
        sizes, head_dim=sizes["d_head"], query_pre_attn_scalar=sizes["d_head"], sliding_window=8, layer_types=layers,
        tie_word_embeddings=True,
    )  # fmt: skip


BEFORE_AND_AFTER = {
    Part.ATTN_OUT: Reach(path=f"{BLOCK}.post_attention_layernorm"),
    Part.RESID_MID: Reach(path=f"{BLOCK}.pre_feedforward_layernorm", side="input", carry=BLOCK),
    Part.MLP_IN: Reach(path=f"{BLOCK}.pre_feedforward_layernorm"),
    Part.MLP_OUT: Reach(path=f"{BLOCK}.post_feedforward_layernorm"),
}
"""Norms before and after each sublayer."""

FAMILY = Family(
    name="gemma3",
    model_types=("gemma3_text",),
    blocks="model.layers",
    parts={
        **ENDS,
        **ATTENTION,
        **MLP,
        **BEFORE_AND_AFTER,
        Part.Q: Reach(path=f"{BLOCK}.self_attn.q_norm", head_major=True),
        Part.K: Reach(path=f"{BLOCK}.self_attn.k_norm", head_major=True),
    },
    weights=WEIGHTS,
    tiny={"gemma3": Tiny(config="Gemma3TextConfig", model="Gemma3ForCausalLM", fields=gemma_fields)},
    act=f"{BLOCK}.mlp.act_fn",
    down=f"{BLOCK}.mlp.down_proj",
    out=f"{BLOCK}.self_attn.o_proj",
    after_attn=f"{BLOCK}.post_attention_layernorm",
    after_mlp=f"{BLOCK}.post_feedforward_layernorm",
)
