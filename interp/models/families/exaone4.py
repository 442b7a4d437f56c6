"""EXAONE 4: OLMo 2's layout, with queries and keys normed head by head as in Gemma 3."""

from dataclasses import replace

from interp.core.sites import Part
from interp.models.families import gemma3, olmo2

FAMILY = replace(
    olmo2.FAMILY,
    name="exaone4",
    model_types=("exaone4",),
    parts={**olmo2.FAMILY.parts, Part.Q: gemma3.FAMILY.parts[Part.Q], Part.K: gemma3.FAMILY.parts[Part.K]},
    tiny={},
)
