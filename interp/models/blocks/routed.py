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
A capsule layer's iterations are its layers: `caps:routing.0` is what the first iteration starts from.
"""

from __future__ import annotations

from typing import Any, cast

from interp.core.sites import Part
from interp.models.family import Block, Reach


def function_gate(
    *classes: str,
    part: Part,
    op: str = "sigmoid",
    nth: int = 0,
    has: tuple[str, ...] = (),
    axes: tuple[str, ...] = ("batch", "..."),
) -> Block:
    """The block of classes whose gate is the n-th result of a torch function; `register_block` makes it known."""
    return Block(
        name=f"{part}-{op}",
        classes=classes,
        has=has,
        parts={part: Reach(path="", side="op", op=op, nth=nth, axes=axes)},
    )


BLOCKS: tuple[Block, ...] = (
    Block(
        name="skip-attention",
        classes=("AttentionBlock", "Attention_block", "AttentionGate"),
        has=("W_g", "W_x", "psi"),
        parts={Part.SKIP_GATE: Reach(path="psi")},
    ),
    function_gate("GatedSkip", "GateSkip", "SkipGate", part=Part.RESIDUAL_GATE, has=("gate",)),
    function_gate("EarlyExit", "ExitGate", part=Part.EXIT_GATE, has=("gate",)),
    function_gate("GatedMultimodalUnit", "GatedBimodal", "GMU", part=Part.MODALITY_GATE),
    Block(
        name="dynamic-routing",
        classes=("DenseCapsule", "CapsuleLayer", "RoutingCapsules"),
        has=("routings",),
        parts={Part.ROUTING: Reach(path="", side="op", op="softmax", stride=1, axes=("batch", "out", "in", "..."))},
        layers=lambda module: int(cast(Any, module).routings),
    ),
)
