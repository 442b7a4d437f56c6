"""GLM 4 (first release): Llama's layout with a fused gate and up projection."""

from interp.models.families.llama import BLOCK, BLOCK_PARTS, WEIGHTS
from interp.models.families.phi3 import FUSED, FUSED_WEIGHTS
from interp.models.family import Family

FAMILY = Family(
    name="glm",
    model_types=("glm",),
    blocks="model.layers",
    parts={**BLOCK_PARTS, **FUSED},
    weights={**WEIGHTS, **FUSED_WEIGHTS},
    act=f"{BLOCK}.mlp.activation_fn",
    down=f"{BLOCK}.mlp.down_proj",
    out=f"{BLOCK}.self_attn.o_proj",
)
