"""HookedTransformer (TransformerLens 3) with an ungated MLP: `neurons_pre` in place of `gate_pre` and `up`."""

from interp.core.sites import Part
from interp.models.families.hooked import BLOCK, COMMON, WEIGHTS
from interp.models.family import Family, Reach, Weight

FAMILY = Family(
    name="hooked",
    model_types=("HookedTransformer",),
    blocks="blocks",
    parts={**COMMON, Part.NEURONS_PRE: Reach(path=f"{BLOCK}.mlp.hook_pre")},
    weights={**WEIGHTS, "W_in": Weight(path=f"{BLOCK}.mlp.W_in", transpose=False)},
)
