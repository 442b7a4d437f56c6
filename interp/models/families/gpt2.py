"""GPT-2: pre-norm blocks, learned positions, fused query-key-value projection, ungated GELU MLP (Conv1D weights)."""

from collections.abc import Mapping
from typing import Any

from interp.core.sites import Part
from interp.models.family import Family, Reach, Tiny, Weight

BLOCK = "transformer.h.{layer}"


def _fields(sizes: Mapping[str, int]) -> dict[str, Any]:
    """GPT-2 has its own names, and full attention only."""
    return {
        "vocab_size": sizes["d_vocab"], "n_embd": sizes["d_model"], "n_inner": sizes["d_mlp"],
        "n_layer": sizes["n_layers"], "n_head": sizes["n_heads"], "n_positions": sizes["n_ctx"],
    }  # fmt: skip


FAMILY = Family(
    name="gpt2",
    model_types=("gpt2",),
    blocks="transformer.h",
    parts={
        Part.EMBED: Reach(path="transformer.wte"),
        Part.RESID_PRE: Reach(path=BLOCK, side="input"),
        Part.ATTN_IN: Reach(path=f"{BLOCK}.ln_1"),
        Part.Q: Reach(path=f"{BLOCK}.attn.c_attn", heads="n_heads", chunk=(0, 3)),
        Part.K: Reach(path=f"{BLOCK}.attn.c_attn", heads="n_kv_heads", chunk=(1, 3)),
        Part.V: Reach(path=f"{BLOCK}.attn.c_attn", heads="n_kv_heads", chunk=(2, 3)),
        Part.ATTN_SCORES: Reach(path=f"{BLOCK}.attn", side="attention"),
        Part.PATTERN: Reach(path=f"{BLOCK}.attn", side="attention"),
        Part.Z: Reach(path=f"{BLOCK}.attn.c_proj", side="input", heads="n_heads"),
        Part.ATTN_OUT: Reach(path=f"{BLOCK}.attn"),
        Part.RESID_MID: Reach(path=f"{BLOCK}.ln_2", side="input", carry=BLOCK),
        Part.MLP_IN: Reach(path=f"{BLOCK}.ln_2"),
        Part.NEURONS_PRE: Reach(path=f"{BLOCK}.mlp.c_fc"),
        Part.NEURONS: Reach(path=f"{BLOCK}.mlp.c_proj", side="input"),
        Part.MLP_OUT: Reach(path=f"{BLOCK}.mlp"),
        Part.RESID_POST: Reach(path=BLOCK),
        Part.FINAL_NORM: Reach(path="transformer.ln_f"),
        Part.LOGITS: Reach(path="lm_head"),
    },
    weights={
        "W_E": Weight(path="transformer.wte.weight", transpose=False),
        "W_Q": Weight(path=f"{BLOCK}.attn.c_attn.weight", transpose=False, chunk=(0, 3)),
        "W_K": Weight(path=f"{BLOCK}.attn.c_attn.weight", transpose=False, chunk=(1, 3)),
        "W_V": Weight(path=f"{BLOCK}.attn.c_attn.weight", transpose=False, chunk=(2, 3)),
        "W_O": Weight(path=f"{BLOCK}.attn.c_proj.weight", transpose=False, heads="n_heads"),
        "W_in": Weight(path=f"{BLOCK}.mlp.c_fc.weight", transpose=False),
        "W_down": Weight(path=f"{BLOCK}.mlp.c_proj.weight", transpose=False),
        "W_U": Weight(path="lm_head.weight"),
    },
    tiny={"gpt2": Tiny(config="GPT2Config", model="GPT2LMHeadModel", fields=_fields)},
    act=f"{BLOCK}.mlp.act",
    down=f"{BLOCK}.mlp.c_proj",
    out=f"{BLOCK}.attn.c_proj",
)
