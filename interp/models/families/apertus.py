"""Apertus: an ungated MLP whose activation, xIELU, has two learnt parameters; queries and keys normed head by head."""

from dataclasses import replace

from interp.core.sites import Part
from interp.models.families import arcee, gemma3
from interp.models.families.llama import BLOCK
from interp.models.family import Reach

FAMILY = replace(
    arcee.FAMILY,
    name="apertus",
    model_types=("apertus",),
    parts={
        **arcee.UNGATED_PARTS,
        Part.Q: gemma3.FAMILY.parts[Part.Q],
        Part.K: gemma3.FAMILY.parts[Part.K],
        Part.ATTN_IN: Reach(path=f"{BLOCK}.attention_layernorm"),
        Part.RESID_MID: Reach(path=f"{BLOCK}.feedforward_layernorm", side="input", carry=BLOCK),
        Part.MLP_IN: Reach(path=f"{BLOCK}.feedforward_layernorm"),
    },
)
