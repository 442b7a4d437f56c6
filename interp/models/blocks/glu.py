"""Gated MLPs of vision networks: which half of the projection is the gate, and what does it let through?

    neurons = act(x W_gate) * (x W_up), output = norm(neurons) W_down

timm's GluMlp holds gate and up in one projection `fc1`, the gate LAST unless `gate_last=False`; its SwiGLUPacked is a
GluMlp with the gate FIRST, so reading it like the default swaps gate and up. With `use_conv` the halves are channels
of a feature map. timm's SwiGLU and the DINO models have a projection each; the original DINOv2 one, w12, gate first.
`neurons` is the product itself: timm may norm it before W_down. (Dauphin et al. 2017, arxiv.org/abs/1612.08083;
Shazeer 2020, arxiv.org/abs/2002.05202)
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from interp.core.sites import Part
from interp.models.family import Block, Reach, Rule, View

MLP = ("batch", "...", "d_mlp")
OUT = Reach(path="", axes=("batch", "...", "d_model"))


def _half(which: int) -> View:
    """The first or second half of the width, or of the channels where the projection is a convolution."""

    def axis(module: nn.Module) -> int:
        return 1 if isinstance(module, nn.Conv2d) else -1

    def write(module: nn.Module, x: Tensor, new: Tensor) -> Tensor:
        halves = list(x.chunk(2, dim=axis(module)))
        halves[which] = new
        return torch.cat(halves, dim=axis(module))

    return View(read=lambda module, x: x.chunk(2, dim=axis(module))[which], write=write)


def _act(name: str) -> Rule:
    return Rule(
        text="act(gate_pre) == gate",
        result=Part.GATE,
        inputs=(Part.GATE_PRE,),
        function=lambda module, x: module.get_submodule(name)(x.clone()),
    )


SILU = Rule(
    text="silu(gate_pre) == gate",
    result=Part.GATE,
    inputs=(Part.GATE_PRE,),
    function=lambda _module, x: x * torch.sigmoid(x),
)
PRODUCT = Rule(
    text="gate * up == neurons",
    result=Part.NEURONS,
    inputs=(Part.GATE, Part.UP),
    function=lambda _module, gate, up: gate * up,
)


def _packed(*, gate_last: bool) -> Block:
    """timm's GluMlp, with the gate in the second or in the first half of `fc1`."""
    gate = int(gate_last)
    return Block(
        name=f"GluMlp-gate-{'last' if gate_last else 'first'}",
        classes=("GluMlp",),
        has=("fc1", "act", "drop1", "fc2", "gate_last"),
        when=lambda module: bool(cast(Any, module).gate_last) is gate_last,
        parts={
            Part.GATE_PRE: Reach(path="fc1", view=_half(gate), axes=MLP),
            Part.GATE: Reach(path="act", axes=MLP),
            Part.UP: Reach(path="fc1", view=_half(1 - gate), axes=MLP),
            Part.NEURONS: Reach(path="drop1", side="input", axes=MLP),
            Part.MLP_OUT: OUT,
        },
        rules=(_act("act"), PRODUCT),
    )


DINO = (
    "Dinov2SwiGLUFFN", "Dinov2WithRegistersSwiGLUFFN", "DINOv3ViTGatedMLP", "Deimv2SwiGLUFFN", "EomtSwiGLUFFN",
    "EomtDinov3GatedMLP", "RadioSwiGLUFFN", "RfDetrDinov2SwiGLUFFN", "Sapiens2GatedMLP", "Tipsv2VisionSwiGLUFFN",
    "VideomtSwiGLUFFN", "VideomtGatedMLP",
)  # fmt: skip
"""Classes in transformers of one layout: gate_proj, up_proj, act_fn, down_proj."""

BLOCKS: tuple[Block, ...] = (
    _packed(gate_last=True),
    _packed(gate_last=False),
    Block(
        name="SwiGLU",
        classes=("SwiGLU",),
        has=("fc1_g", "fc1_x", "act", "drop1", "fc2"),
        parts={
            Part.GATE_PRE: Reach(path="fc1_g", axes=MLP),
            Part.GATE: Reach(path="act", axes=MLP),
            Part.UP: Reach(path="fc1_x", axes=MLP),
            Part.NEURONS: Reach(path="drop1", side="input", axes=MLP),
            Part.MLP_OUT: OUT,
        },
        rules=(_act("act"), PRODUCT),
    ),
    Block(
        name="SwiGLUFFN",
        classes=DINO,
        has=("gate_proj", "up_proj", "act_fn", "down_proj"),
        parts={
            Part.GATE_PRE: Reach(path="gate_proj", axes=MLP),
            Part.GATE: Reach(path="act_fn", axes=MLP),
            Part.UP: Reach(path="up_proj", axes=MLP),
            Part.NEURONS: Reach(path="down_proj", side="input", axes=MLP),
            Part.MLP_OUT: OUT,
        },
        rules=(_act("act_fn"), PRODUCT),
    ),
    Block(
        name="SwiGLUFFN-packed",
        classes=("SwiGLUFFN", "SwiGLUFFNFused"),
        has=("w12", "w3"),
        parts={
            Part.GATE_PRE: Reach(path="w12", chunk=(0, 2), axes=MLP),
            Part.GATE: Reach(path="", side="op", op="silu", axes=MLP),
            Part.UP: Reach(path="w12", chunk=(1, 2), axes=MLP),
            Part.NEURONS: Reach(path="w3", side="input", axes=MLP),
            Part.MLP_OUT: OUT,
        },
        rules=(SILU, PRODUCT),
    ),
)
