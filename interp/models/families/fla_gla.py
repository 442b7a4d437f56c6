"""Gated linear attention (flash-linear-attention): S = diag(e^g) S + k v^T, g = log sigmoid(decay_pre) / 16.

Sites: `q`, `k`, `v`, `decay_pre` (gk_proj), `log_decay` g (before `clamp_min`), `readout`, `output_gate_pre` (g_proj),
`output_gate`, `mixer_out`. Written from the source of version 0.6.0 (fla/layers/gla.py) and never run with its kernels:
see `interp.models.linear_fla`. With `num_kv_heads` below `num_heads` decays are repeated, and `log_decay` has more
channels than `decay_pre`. Source: Yang et al., arXiv 2312.06635.
"""

from interp.core.sites import Part
from interp.models.family import Family, Reach, Rule
from interp.models.linear_fla import ATTN, FLA_WEIGHTS, MLP_OUT, OPTIONAL, OUT, STREAM, fla_parts, gated_out, log_gate

FAMILY = Family(
    name="fla-gla",
    model_types=("gla",),
    blocks="model.layers",
    parts={
        **fla_parts(),
        Part.DECAY_PRE: Reach(path=f"{ATTN}.gk_proj"),
        Part.LOG_DECAY: Reach(path=ATTN, side="op", op="div", needs=f"{ATTN}.gk_proj"),
        **gated_out("g_norm_swish_gate"),
    },
    weights=FLA_WEIGHTS,
    optional=OPTIONAL,
    rules=(
        STREAM,
        OUT,
        MLP_OUT,
        Rule(
            text="log sigmoid(decay_pre) / n == log_decay",
            result=Part.LOG_DECAY,
            inputs=(Part.DECAY_PRE,),
            function=lambda layer, x: log_gate(layer, x).unflatten(-1, (-1, layer.attn.head_k_dim)),
        ),
    ),
)
