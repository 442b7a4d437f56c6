"""TransformerBridge (TransformerLens 3 and later) around any architecture: its hook points are the sites.

The bridge gives every architecture the same hook names, so one table serves all; what an architecture lacks (a stream
between attention and MLP in parallel blocks, one MLP in a mixture of experts) is not there. The bridge runs attention
itself, so patterns come from its hook points, and its values differ from the wrapped model's by rounding:
`verify(model, reference=...)` says by how much.
"""

from torch import Tensor, nn

from interp.core.sites import Part
from interp.models.family import Family, Reach, View, Weight

BLOCK = "blocks.{layer}"


def _flat(_module: nn.Module, x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(-2) if x.ndim == 4 else x


def _by_heads(_module: nn.Module, x: Tensor, new: Tensor) -> Tensor:
    return new.unflatten(-1, (x.shape[1], x.shape[3])).transpose(1, 2) if x.ndim == 4 else new


NORMED = View(read=_flat, write=_by_heads)
"""Normed queries are (batch, head, pos, d_head) if each head is normed, (batch, pos, width) if all are at once."""

COMMON = {
    Part.EMBED: Reach(path="embed.hook_out"),
    Part.RESID_PRE: Reach(path=f"{BLOCK}.hook_in"),
    Part.ATTN_IN: Reach(path=f"{BLOCK}.attn.hook_in"),
    Part.Q: (
        Reach(path=f"{BLOCK}.attn.q_norm.hook_out", heads="n_heads", view=NORMED),
        Reach(path=f"{BLOCK}.attn.q.hook_out", heads="n_heads"),
    ),
    Part.K: (
        Reach(path=f"{BLOCK}.attn.k_norm.hook_out", heads="n_kv_heads", view=NORMED),
        Reach(path=f"{BLOCK}.attn.k.hook_out", heads="n_kv_heads"),
    ),
    Part.V: Reach(path=f"{BLOCK}.attn.v.hook_out", heads="n_kv_heads"),
    Part.ATTN_SCORES: Reach(path=f"{BLOCK}.attn.hook_attn_scores"),
    Part.PATTERN: Reach(path=f"{BLOCK}.attn.hook_pattern"),
    Part.Z: Reach(path=f"{BLOCK}.attn.o.hook_in", heads="n_heads"),
    Part.ATTN_OUT: Reach(path=f"{BLOCK}.hook_attn_out"),
    Part.RESID_MID: Reach(path=f"{BLOCK}.hook_resid_mid", carry=BLOCK),
    Part.MLP_IN: Reach(path=f"{BLOCK}.mlp.hook_in"),
    Part.MLP_OUT: Reach(path=f"{BLOCK}.hook_mlp_out"),
    Part.RESID_POST: Reach(path=f"{BLOCK}.hook_out"),
    Part.FINAL_NORM: Reach(path="ln_final.hook_out"),
    Part.LOGITS_PRE: Reach(path="unembed.hook_out"),
    Part.LOGITS: Reach(path=""),
}
ALWAYS = frozenset({Part.RESID_PRE, Part.RESID_POST, Part.LOGITS})
WEIGHTS = {
    "W_E": Weight(path="embed._original_component.weight", transpose=False),
    "W_U": Weight(path="unembed._original_component.weight"),
}
PARTS = {
    **COMMON,
    Part.NEURONS_PRE: Reach(path=f"{BLOCK}.mlp.in.hook_out"),
    Part.NEURONS: Reach(path=f"{BLOCK}.mlp.out.hook_in"),
}

FAMILY = Family(
    name="bridge",
    model_types=("TransformerBridge",),
    blocks="blocks",
    parts=PARTS,
    optional=frozenset(PARTS) - ALWAYS,
    weights=WEIGHTS,
)
