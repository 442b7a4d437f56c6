"""Arcee and Jais 2: Llama's layout with an ungated squared-ReLU MLP: `neurons_pre` in place of `gate_pre` and `up`."""

from interp.core.sites import Part
from interp.models.families.llama import BLOCK, BLOCK_PARTS, WEIGHTS
from interp.models.family import Family, Reach, Weight

GATED = (Part.GATE_PRE, Part.GATE, Part.UP)
UNGATED_PARTS = {
    **{part: reach for part, reach in BLOCK_PARTS.items() if part not in GATED},
    Part.NEURONS_PRE: Reach(path=f"{BLOCK}.mlp.up_proj"),
}
UNGATED_WEIGHTS = {
    **{name: weight for name, weight in WEIGHTS.items() if name not in ("W_gate", "W_up")},
    "W_in": Weight(path=f"{BLOCK}.mlp.up_proj.weight"),
}

FAMILY = Family(
    name="arcee",
    model_types=("arcee", "jais2"),
    blocks="model.layers",
    parts=UNGATED_PARTS,
    weights=UNGATED_WEIGHTS,
    act=f"{BLOCK}.mlp.act_fn",
    down=f"{BLOCK}.mlp.down_proj",
    out=f"{BLOCK}.self_attn.o_proj",
)
