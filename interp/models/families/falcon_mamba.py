"""Falcon Mamba: Mamba whose step size, B and C are normed (root mean square, no weights) between x_proj and their use.

See `mamba` for the sites and traps. `step_latent`, `state_in` and `state_out` are read after their norms.
Source: transformers 5.23 (model type falcon_mamba).
"""

from interp.core.sites import Part
from interp.models.families import mamba
from interp.models.families.mamba import MIXER
from interp.models.family import Family, Reach, Tiny
from interp.models.linear_views import CHANNELS_FIRST

STATE = ("batch", "pos", "d_state")
NORMED = {
    Part.STEP_LATENT: Reach(path=f"{MIXER}.dt_layernorm"),
    Part.STATE_IN: Reach(path=f"{MIXER}.b_layernorm", axes=STATE),
    Part.STATE_OUT: Reach(path=f"{MIXER}.c_layernorm", axes=STATE),
    Part.STEP_SIZE_PRE: Reach(path=MIXER, side="op", op="add", nth=3, view=CHANNELS_FIRST),
}
"""Each of the three norms adds its epsilon before the bias of the step size is added."""

FAMILY = Family(
    name="falcon-mamba",
    model_types=("falcon_mamba",),
    blocks="backbone.layers",
    parts={**mamba.FAMILY.parts, **NORMED},
    weights=mamba.FAMILY.weights,
    sizes=mamba.FAMILY.sizes,
    rules=tuple(rule for rule in mamba.RULES if rule.result is not Part.STEP_LATENT),
    tiny={"falcon-mamba": Tiny(config="FalconMambaConfig", model="FalconMambaForCausalLM", fields=mamba.mamba_fields)},
)
