"""Gated DeltaNet (flash-linear-attention): the delta rule of `interp.models.linear_delta` in a fused kernel.

The kernel takes raw values: the sigmoid of `write_gate_pre` (b_proj), and -exp(A_log) softplus(decay_pre + dt_bias) of
`decay_pre` (a_proj) are inside it and cannot be read; edit what goes in. Sites: `q`, `k`, `v` (before the convolution,
which may be one fused call), `write_gate_pre`, `decay_pre`, `output_gate_pre` (g_proj), `mixer_out`. Written from the
source of version 0.6.0 (fla/layers/gated_deltanet.py) and never run: see `interp.models.linear_fla`. Trap: with
`allow_neg_eigval` the write gate is twice the sigmoid. Source: Yang et al., arXiv 2412.06464.
"""

from interp.core.sites import Part
from interp.models.family import Family, Reach
from interp.models.linear_fla import ATTN, FLA_WEIGHTS, OUT, STREAM, fla_parts

FAMILY = Family(
    name="fla-gated-deltanet",
    model_types=("gated_deltanet",),
    blocks="model.layers",
    parts={
        **fla_parts(),
        Part.WRITE_GATE_PRE: Reach(path=f"{ATTN}.b_proj"),
        Part.DECAY_PRE: Reach(path=f"{ATTN}.a_proj"),
        Part.OUTPUT_GATE_PRE: Reach(path=f"{ATTN}.g_proj", axes=("batch", "pos", "d_inner")),
        Part.MIXER_OUT: Reach(path=f"{ATTN}.o_proj", side="input"),
    },
    weights=FLA_WEIGHTS,
    optional=frozenset({Part.OUTPUT_GATE_PRE}),
    rules=(STREAM, OUT),
)
