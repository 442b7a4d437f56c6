"""Gated slot attention (flash-linear-attention): m slots of memory, each forgetting at its own rate.

    f = log sigmoid(decay_pre) / n;  s = 1 - e^f;  K = e^f K + s k^T;  V = e^f V + s v^T;  out = V^T softmax(K q)

Sites: `q`, `k`, `v`, `decay_pre` (f_proj), `log_decay` f, whose edit changes s as well, `write_gate` s, whose edit does
not change f. o_proj and its norm are fused, so there is no `mixer_out`. Written from the source of version 0.6.0
(fla/layers/gsa.py) and never run with its kernels: see `interp.models.linear_fla`. Source: Zhang et al., arXiv
2409.07146.
"""

import torch

from interp.core.sites import Part
from interp.models.family import Family, Reach, Rule
from interp.models.linear_fla import ATTN, FLA_WEIGHTS, MLP_OUT, OPTIONAL, STREAM, fla_parts, log_gate

GATE = f"{ATTN}.f_proj"

FAMILY = Family(
    name="fla-gsa",
    model_types=("gsa",),
    blocks="model.layers",
    parts={
        **fla_parts(),
        Part.DECAY_PRE: Reach(path=GATE),
        Part.LOG_DECAY: Reach(path=ATTN, side="op", op="div", needs=GATE),
        Part.WRITE_GATE: Reach(path=ATTN, side="op", op="__rsub__", needs=GATE),
    },
    weights=FLA_WEIGHTS,
    optional=OPTIONAL,
    rules=(
        STREAM,
        MLP_OUT,
        Rule(
            text="log sigmoid(decay_pre) / n == log_decay",
            result=Part.LOG_DECAY,
            inputs=(Part.DECAY_PRE,),
            function=lambda layer, x: log_gate(layer, x).unflatten(-1, (-1, layer.attn.num_slots)),
        ),
        Rule(
            text="1 - exp(log_decay) == write_gate",
            result=Part.WRITE_GATE,
            inputs=(Part.LOG_DECAY,),
            function=lambda _layer, x: -torch.expm1(x),
        ),
    ),
)
