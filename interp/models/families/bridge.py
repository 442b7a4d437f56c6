"""TransformerBridge (TransformerLens 3 and later) around a model with a gated MLP: `gate_pre` and `up` as well.

The bridge keeps the wrapped modules under `_original_component` and puts hook points, which are modules, around them.
"""

from interp.core.sites import Part
from interp.models.families.bridge_ungated import ALWAYS, BLOCK, COMMON, WEIGHTS
from interp.models.family import OWNER, Family, Reach, Weight

PARTS = {
    **COMMON,
    Part.GATE_PRE: Reach(path=f"{BLOCK}.mlp.gate.hook_out"),
    Part.GATE: Reach(path=f"{BLOCK}._original_component.mlp._original_component.act_fn"),
    Part.UP: Reach(path=f"{BLOCK}.mlp.in.hook_out"),
    Part.NEURONS: Reach(path=f"{BLOCK}.mlp.out.hook_in"),
}

FAMILY = Family(
    name="bridge-gated",
    model_types=("TransformerBridge:gated",),
    blocks="blocks",
    parts=PARTS,
    optional=frozenset(PARTS) - ALWAYS,
    weights={
        **WEIGHTS,
        "W_V": Weight(path=f"{BLOCK}.attn.v._original_component.weight"),
        "W_O": Weight(path=f"{BLOCK}.attn.o._original_component.weight", heads="n_heads"),
        "W_gate": Weight(path=f"{BLOCK}.mlp.gate._original_component.weight"),
        "W_up": Weight(path=f"{BLOCK}.mlp.in._original_component.weight"),
        "W_down": Weight(path=f"{BLOCK}.mlp.out._original_component.weight"),
    },
    after_attn=OWNER,
    after_mlp=OWNER,
)
