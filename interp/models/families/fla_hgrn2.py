"""HGRN2 (flash-linear-attention): S = diag(f) S + (1 - f) i^T, f = lower + (1 - lower) sigmoid(forget_gate_pre).

The lower bound is per layer, and 0 in the first. Sites: `q`, `v` (the input i), `forget_gate_pre` (f_proj),
`forget_gate` f, which can only be read: the code takes its logarithm for the state and f itself for the key. o_proj and
its norm are fused, so there is no `mixer_out`. Written from the source of version 0.6.0 (fla/layers/hgrn2.py) and never
run with its kernels: see `interp.models.linear_fla`. With `use_short_conv` the gate is convolved after f_proj. Source:
Qin et al., arXiv 2404.07904.
"""

from interp.core.sites import Part
from interp.models.family import Family, Reach
from interp.models.linear_fla import ATTN, FLA_WEIGHTS, MLP_OUT, OPTIONAL, STATE, STREAM, fla_parts

FAMILY = Family(
    name="fla-hgrn2",
    model_types=("hgrn2",),
    blocks="model.layers",
    parts={
        **fla_parts(k=None, v="i_proj"),
        Part.FORGET_GATE_PRE: Reach(path=f"{ATTN}.f_proj", axes=STATE),
        Part.FORGET_GATE: Reach(
            path=ATTN, side="op", op="exp", needs=f"{ATTN}.f_proj", instead=Part.FORGET_GATE_PRE, axes=STATE
        ),
    },
    weights=FLA_WEIGHTS,
    optional=OPTIONAL,
    rules=(STREAM, MLP_OUT),
)
