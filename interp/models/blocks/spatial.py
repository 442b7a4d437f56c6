"""Gates over positions: what does a gMLP let through at each position, and where does ConViT trust distance alone?

    gMLP:   u, v = halves of x; gate = W norm(v) + b along the positions; output = u * gate
            (Liu et al. 2021, arxiv.org/abs/2105.08050; timm SpatialGatingUnit)
    ConViT: attention = (1 - gate) softmax(q k) + gate softmax(positions), gate = sigmoid(gating_param), one per head
            (d'Ascoli et al. 2021, arxiv.org/abs/2103.10697; timm GPSA)

ConViT computes the sigmoid twice, once for each share, so its result is read only: edit `position_gate_pre`, the
parameter, which both follow. A gate of g is `position_gate_pre` = log(g / (1 - g)).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from interp.core.sites import Part
from interp.models.family import Block, Reach, Rule, View

FLIPPED = View(read=lambda _module, x: x.transpose(-1, -2), write=lambda _module, _x, new: new.transpose(-1, -2))
"""The projection along positions has them last."""
PER_HEAD = View(read=lambda _module, x: x.flatten(), write=lambda _module, x, new: new.view_as(x))
"""(1, head, 1, 1) as (head,)."""


def _sigmoid(_module: Any, x: Tensor) -> Tensor:
    return torch.sigmoid(x)


BLOCKS: tuple[Block, ...] = (
    Block(
        name="spatial-gating-unit",
        classes=("SpatialGatingUnit",),
        has=("norm", "proj"),
        parts={Part.SPATIAL_GATE: Reach(path="proj", view=FLIPPED)},
    ),
    Block(
        name="gated-positional-attention",
        classes=("GPSA",),
        has=("gating_param", "pos_proj", "qk"),
        parts={
            Part.POSITION_GATE_PRE: Reach(path="", side="parameter", item="gating_param"),
            Part.POSITION_GATE: Reach(path="", side="op", op="sigmoid", view=PER_HEAD, instead=Part.POSITION_GATE_PRE),
        },
        rules=(
            Rule(
                text="sigmoid(position_gate_pre) == position_gate",
                result=Part.POSITION_GATE,
                inputs=(Part.POSITION_GATE_PRE,),
                function=_sigmoid,
            ),
        ),
    ),
)
