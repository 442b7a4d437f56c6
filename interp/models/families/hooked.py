"""HookedTransformer (TransformerLens 3), gated MLP: its hook points are modules, so a site is a hook point's output.

Values are the user's converted model's, within its own numerics. The class keeps scores with `-inf` where masked and
adds `b_in` after the gate, so `up` is the product without a bias.
"""

from interp.core.sites import Part
from interp.models.family import Family, Reach, Weight

BLOCK = "blocks.{layer}"

COMMON = {
    Part.EMBED: Reach(path="hook_embed"),
    Part.RESID_PRE: Reach(path=f"{BLOCK}.hook_resid_pre"),
    Part.Q: Reach(path=f"{BLOCK}.attn.hook_q"),
    Part.K: Reach(path=f"{BLOCK}.attn.hook_k"),
    Part.V: Reach(path=f"{BLOCK}.attn.hook_v"),
    Part.ATTN_SCORES: Reach(path=f"{BLOCK}.attn.hook_attn_scores"),
    Part.PATTERN: Reach(path=f"{BLOCK}.attn.hook_pattern"),
    Part.Z: Reach(path=f"{BLOCK}.attn.hook_z"),
    Part.ATTN_OUT: Reach(path=f"{BLOCK}.hook_attn_out"),
    Part.RESID_MID: Reach(path=f"{BLOCK}.hook_resid_mid"),
    Part.NEURONS: Reach(path=f"{BLOCK}.mlp.hook_post"),
    Part.MLP_OUT: Reach(path=f"{BLOCK}.hook_mlp_out"),
    Part.RESID_POST: Reach(path=f"{BLOCK}.hook_resid_post"),
    Part.FINAL_NORM: Reach(path="ln_final"),
    Part.LOGITS: Reach(path="unembed"),
}
WEIGHTS = {
    "W_E": Weight(path="embed.W_E", transpose=False),
    "W_O": Weight(path=f"{BLOCK}.attn.W_O", transpose=False),
    "W_down": Weight(path=f"{BLOCK}.mlp.W_out", transpose=False),
    "W_U": Weight(path="unembed.W_U", transpose=False),
}

FAMILY = Family(
    name="hooked-gated",
    model_types=("HookedTransformer:gated",),
    blocks="blocks",
    parts={
        **COMMON,
        Part.GATE_PRE: Reach(path=f"{BLOCK}.mlp.hook_pre"),
        Part.UP: Reach(path=f"{BLOCK}.mlp.hook_pre_linear"),
    },
    weights={
        **WEIGHTS,
        "W_gate": Weight(path=f"{BLOCK}.mlp.W_gate", transpose=False),
        "W_up": Weight(path=f"{BLOCK}.mlp.W_in", transpose=False),
    },
)
