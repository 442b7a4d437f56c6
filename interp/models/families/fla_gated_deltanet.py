"""Gated DeltaNet (flash-linear-attention): the delta rule of `interp.models.linear_delta` in a fused kernel.

Sites: `q`, `k`, `v` (before the convolution, which may be one fused call), `write_gate_pre`, `decay_pre`, `readout`,
`output_gate_pre` (g_proj), `output_gate`, `mixer_out`. The kernel takes raw values: the sigmoid of `write_gate_pre`
(b_proj), and -exp(A_log) softplus(decay_pre + dt_bias) of `decay_pre` (a_proj) are inside it and cannot be read; edit
what goes in. Written from the source of version 0.6.0 (fla/layers/gated_deltanet.py) and never run with its kernels:
see `interp.models.linear_fla`. Trap: with `allow_neg_eigval` the write gate is twice the sigmoid. Source: Yang et al.,
arXiv 2412.06464.
"""

from interp.core.sites import Part
from interp.models.family import Family, Reach
from interp.models.linear_fla import ATTN, FLA_WEIGHTS, MLP_OUT, OPTIONAL, OUT, STREAM, fla_parts, gated_out

FAMILY = Family(
    name="fla-gated-deltanet",
    model_types=("gated_deltanet",),
    blocks="model.layers",
    parts={
        **fla_parts(),
        Part.WRITE_GATE_PRE: Reach(path=f"{ATTN}.b_proj"),
        Part.DECAY_PRE: Reach(path=f"{ATTN}.a_proj"),
        **gated_out("o_norm"),
    },
    weights=FLA_WEIGHTS,
    optional=OPTIONAL,
    rules=(STREAM, OUT, MLP_OUT),
)
