"""Gates on a residual branch that are parameters: how much of each branch does the network take?

    output = x + gate * F(x), the gate one number (ReZero, Bachlechner et al. 2021, arxiv.org/abs/2003.04887) or one per
    channel (layer scale, Touvron et al. 2021, arxiv.org/abs/2103.17239)

The gate is no module's output, but the module's parameter: an edit replaces it wherever the module uses it, for the
duration of the context, and never writes to it. `parameter_gate` gives the same to any class of one's own.
"""

from __future__ import annotations

from interp.core.sites import Part
from interp.models.family import Block, Reach


def parameter_gate(
    *classes: str,
    parameter: str,
    part: Part = Part.RESIDUAL_GATE,
    axes: tuple[str, ...] = ("channel",),
    mixes: bool = False,
) -> Block:
    """The block of classes that hold a gate as a parameter; `register_block` makes it known.

    `mixes`: the output is affine in the gate, as it is where a factor is used once; the probe then proves it.
    """
    return Block(
        name=f"{part}-{parameter}",
        classes=classes,
        has=(parameter,),
        parts={part: Reach(path="", side="parameter", item=parameter, axes=axes)},
        mixes=part if mixes else None,
    )


LAYER_SCALES = (
    "Dinov2LayerScale", "Dinov2WithRegistersLayerScale", "DINOv3ViTLayerScale", "EomtLayerScale",
    "EomtDinov3LayerScale", "RadioLayerScale", "RfDetrDinov2LayerScale", "Sam3ViTLayerScale", "Sapiens2LayerScale",
    "Tipsv2VisionLayerScale", "VideomtLayerScale",
)  # fmt: skip

BLOCKS: tuple[Block, ...] = (
    # One factor for attention and MLP, one after the other: the output is not affine in it.
    parameter_gate("RZTXEncoderLayer", "RZTXDecoderLayer", parameter="resweight", axes=("...",)),
    parameter_gate("ReZero", "ReZeroBlock", parameter="alpha", axes=("...",), mixes=True),
    parameter_gate("Rezero", "ReZero", parameter="g", axes=("...",), mixes=True),
    parameter_gate("LayerScale", "LayerScale2d", parameter="gamma", mixes=True),
    parameter_gate(*LAYER_SCALES, parameter="lambda1", mixes=True),
    parameter_gate("ConvNextLayer", parameter="layer_scale_parameter", mixes=True),
    parameter_gate("MimiLayerScale", parameter="scale", mixes=True),
)
