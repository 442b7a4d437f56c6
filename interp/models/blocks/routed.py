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
`function_gate` makes a block: the gate is what the n-th call of a torch function returns while the module runs. A class
with another sigmoid inside a branch is left alone, since that one may run first.
A capsule layer's iterations are its layers: `caps:routing.0` is what the first iteration starts from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import nn

from interp.core.sites import Part
from interp.models.family import Block, Reach


def function_gate(
    *classes: str,
    part: Part,
    op: str = "sigmoid",
    nth: int = 0,
    has: tuple[str, ...] = (),
    axes: tuple[str, ...] = ("batch", "..."),
    when: Callable[[nn.Module], bool] | None = None,
) -> Block:
    """The block of classes whose gate is the n-th result of a torch function; `register_block` makes it known."""
    return Block(
        name=f"{part}-{op}",
        classes=classes,
        has=has,
        when=when,
        parts={part: Reach(path="", side="op", op=op, nth=nth, axes=axes)},
    )


def _ends_in_sigmoid(module: nn.Module) -> bool:
    """Whether psi is the gate, not what a sigmoid turns into one later."""
    return isinstance([*cast(Any, module).psi.modules()][-1], nn.Sigmoid | nn.Hardsigmoid)


def _one_sigmoid(module: nn.Module) -> bool:
    """Whether no other sigmoid, inside a branch, could be taken for the one that makes the gate."""
    found = [path for path, child in module.named_modules() if isinstance(child, nn.Sigmoid)]
    return not found or (len(found) == 1 and ("." not in found[0] or found[0].startswith("gate.")))


BLOCKS: tuple[Block, ...] = (
    Block(
        name="skip-attention",
        classes=("AttentionBlock", "Attention_block", "AttentionGate"),
        has=("W_g", "W_x", "psi"),
        when=_ends_in_sigmoid,
        parts={Part.SKIP_GATE: Reach(path="psi")},
    ),
    function_gate(
        "AttentionBlock",
        "Attention_block",
        "AttentionGate",
        part=Part.SKIP_GATE,
        has=("W_g", "W_x", "psi"),
        axes=("batch", "channel", "height", "width"),
        when=_one_sigmoid,
    ),
    function_gate("GatedSkip", "GateSkip", "SkipGate", part=Part.RESIDUAL_GATE, has=("gate",), when=_one_sigmoid),
    function_gate("EarlyExit", "ExitGate", part=Part.EXIT_GATE, has=("gate",), when=_one_sigmoid),
    function_gate("GatedMultimodalUnit", "GatedBimodal", "GMU", part=Part.MODALITY_GATE, when=_one_sigmoid),
    Block(
        name="dynamic-routing",
        classes=("DenseCapsule", "CapsuleLayer", "RoutingCapsules"),
        has=("routings",),
        parts={Part.ROUTING: Reach(path="", side="op", op="softmax", stride=1, axes=("batch", "out", "in", "..."))},
        layers=lambda module: int(cast(Any, module).routings),
    ),
)
