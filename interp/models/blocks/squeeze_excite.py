"""Squeeze-and-excitation: by which factor is each channel of a feature map multiplied?

    gate = sigmoid(W_2 act(W_1 mean_hw(x))), output = x * gate          (Hu et al. 2018, arxiv.org/abs/1709.01507)

The gate is the output of a module of its own, (batch, channel, 1, 1), so it is read and edited there. Its name differs
from library to library: timm (SEModule, SqueezeExcite, EffectiveSEModule and the channels-last one), torchvision,
transformers (EfficientNet, ALIGN, RegNet, PP-LCNet).
"""

from __future__ import annotations

from interp.core.sites import Part
from interp.models.family import Block, Reach


def _block(name: str, classes: tuple[str, ...], before: str, gate: str, *, channels_last: bool = False) -> Block:
    axes = ("batch", "height", "width", "channel") if channels_last else None
    return Block(
        name=f"squeeze-and-excitation-{name}",
        classes=classes,
        has=tuple(path.partition(".")[0] for path in (before, gate)),
        parts={Part.SE_GATE_PRE: Reach(path=before, axes=axes), Part.SE_GATE: Reach(path=gate, axes=axes)},
    )


BLOCKS: tuple[Block, ...] = (
    _block("timm", ("SEModule",), "fc2", "gate"),
    _block("timm-efficientnet", ("SqueezeExcite",), "conv_expand", "gate"),
    _block("timm-effective", ("EffectiveSEModule",), "fc", "gate"),
    _block("timm-channels-last", ("SqueezeExciteCl",), "fc2", "gate", channels_last=True),
    _block("torchvision", ("SqueezeExcitation",), "fc2", "scale_activation"),
    _block("efficientnet", ("EfficientNetSqueezeExciteLayer", "AlignVisionSqueezeExciteLayer"), "expand", "act_expand"),
    _block("regnet", ("RegNetSELayer",), "attention.2", "attention.3"),
    _block(
        "pp-lcnet",
        ("PPLCNetSqueezeExcitationModule", "PPLCNetV3SqueezeExcitationModule"),
        "convolutions.2",
        "convolutions.3",
    ),
)
