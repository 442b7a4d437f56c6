"""Gates of other networks, found by class and by the function that computes them.

    U-Net attention gate:  gate = sigmoid(psi(relu(W_g g + W_x x))), skip = x * gate
                           (Oktay et al. 2018, arxiv.org/abs/1804.03999; MONAI's AttentionBlock and its kin)
    gated skip of a layer: h + sigmoid(W h + b) * F(h)
    early exit:            p = sigmoid(W pool(h)), leave if p is large    (Teerapittayanon et al. 2016)
    multimodal unit:       z = sigmoid(W [v, t]), z * tanh(W_v v) + (1 - z) * tanh(W_t t)
                           (Arevalo et al. 2017, arxiv.org/abs/1702.01992)
    capsules:              c = softmax(b) over the outputs, once per iteration of the routing
                           (Sabour et al. 2017, arxiv.org/abs/1710.09829)

These have no canonical class. A class of one of the names below is taken if it has the attributes named; for any other
`function_gate` makes a block: the gate is what the n-th call of a torch function returns while the module runs.
A branch may call a sigmoid too, and first. So the gate is the one sigmoid of what the child `gate` (or `psi`) returns,
or that child's own output where it ends in a sigmoid; a unit without such a child must call only one. All else is
refused when it runs: nobody is told a gate that was guessed.
A capsule layer's iterations are its layers: `caps:routing.0` is what the first iteration starts from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from interp.core.sites import Part
from interp.models.family import Block, Reach, Rule


def function_gate(
    *classes: str,
    part: Part,
    op: str = "sigmoid",
    nth: int = 0,
    of: str | None = None,
    only: bool = False,
    has: tuple[str, ...] = (),
    axes: tuple[str, ...] = ("batch", "..."),
    when: Callable[[nn.Module], bool] | None = None,
    rules: tuple[Rule, ...] = (),
    mixes: Part | None = None,
) -> Block:
    """The block of classes whose gate is the n-th result of a torch function; `register_block` makes it known.

    `of` is a child of the module, or a parameter: only calls on what it returns count. `only` refuses a second call.
    """
    return Block(
        name=f"{part}-{op}",
        classes=classes,
        has=has,
        when=when,
        parts={part: Reach(path="", side="op", op=op, nth=nth, of=of, only=only, axes=axes)},
        rules=rules,
        mixes=mixes,
    )


def _ends_in_sigmoid(name: str) -> Callable[[nn.Module], bool]:
    """Whether the child is the gate, not what a sigmoid turns into one later."""

    def ends(module: nn.Module) -> bool:
        child: object = getattr(module, name)
        return isinstance(child, nn.Module) and isinstance([*child.modules()][-1], nn.Sigmoid | nn.Hardsigmoid)

    return ends


def _child_gate(*classes: str, part: Part, axes: tuple[str, ...] = ("batch", "..."), mixes: bool) -> tuple[Block, ...]:
    """A gate that the child `gate` computes, with its sigmoid or before it."""
    mixed = part if mixes else None
    own = Block(
        name=f"{part}-gate",
        classes=classes,
        has=("gate",),
        when=_ends_in_sigmoid("gate"),
        parts={part: Reach(path="gate", axes=axes)},
        rules=(_is_sigmoid(part, own=True),),
        mixes=mixed,
    )
    later = function_gate(
        *classes, part=part, of="gate", only=True, has=("gate",), axes=axes, rules=(_is_sigmoid(part),), mixes=mixed
    )
    return own, later


def _is_sigmoid(part: Part, *, own: bool = False) -> Rule:
    """The gate, from what the child returns as a plain hook sees it."""

    def function(module: nn.Module, gate: Tensor, seen: Tensor | None) -> Tensor:
        if seen is None:  # a parameter
            seen = cast(Tensor, module.gate)
        return (seen if own else torch.sigmoid(seen)).expand_as(gate)

    text = f"gate's output == {part}" if own else f"sigmoid(gate's output) == {part}"
    return Rule(text=text, result=part, inputs=(part,), function=function, modules=("gate",))


SKIP = Rule(
    text="skip * skip_gate == output",
    result=Part.SKIP_GATE,
    inputs=(Part.SKIP_GATE,),
    function=lambda _module, gate, skip, output: (skip * gate, output),
    modules=("W_x@input", ""),
)
UNET = ("AttentionBlock", "Attention_block", "AttentionGate")

BLOCKS: tuple[Block, ...] = (
    Block(
        name="skip-attention",
        classes=UNET,
        has=("W_g", "W_x", "psi"),
        when=_ends_in_sigmoid("psi"),
        parts={Part.SKIP_GATE: Reach(path="psi")},
        rules=(SKIP,),
    ),
    function_gate(
        *UNET,
        part=Part.SKIP_GATE,
        of="psi",
        only=True,
        has=("W_g", "W_x", "psi"),
        axes=("batch", "channel", "height", "width"),
        rules=(SKIP,),
    ),
    *_child_gate("GatedSkip", "GateSkip", "SkipGate", part=Part.RESIDUAL_GATE, mixes=True),
    *_child_gate("EarlyExit", "ExitGate", part=Part.EXIT_GATE, mixes=False),
    function_gate(
        "GatedMultimodalUnit", "GatedBimodal", "GMU", part=Part.MODALITY_GATE, only=True, mixes=Part.MODALITY_GATE
    ),
    Block(
        name="dynamic-routing",
        classes=("DenseCapsule", "CapsuleLayer", "RoutingCapsules"),
        has=("routings",),
        parts={Part.ROUTING: Reach(path="", side="op", op="softmax", stride=1, axes=("batch", "out", "in", "..."))},
        layers=lambda module: int(cast(Any, module).routings),
    ),
)
