"""DINOv2 for image classification: ViT with a layer scale on each branch, and a SwiGLU MLP in the giant one.

`attn_out` and `mlp_out` are what enters the stream, behind the layer scale; the scale itself is the site
`...layer_scale1:residual_gate` of its block. The class reads CLS and the mean over the patches.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from interp.core.sites import Part
from interp.models.families import vit
from interp.models.family import Family, Reach, Rule, Tiny, Weight


def _classify(module: Any, stream: Tensor) -> Tensor:
    head = module.get_submodule("classifier")
    first = 1 + int(getattr(module.config, "num_register_tokens", 0))
    features = torch.cat([stream[:, 0], stream[:, first:].mean(dim=1)], dim=-1)
    return features @ head.get_parameter("weight").T + head.get_parameter("bias")


def dinov2(name: str, tiny: dict[str, Tiny]) -> Family:
    """DINOv2 without or with registers: the same blocks under another name."""
    layer = f"{name}.encoder.layer.{{layer}}"
    gated = {
        Part.GATE_PRE: Reach(path=f"{layer}.mlp.gate_proj"),
        Part.GATE: Reach(path=f"{layer}.mlp.act_fn"),
        Part.UP: Reach(path=f"{layer}.mlp.up_proj"),
    }
    common = vit.parts(layer, ("norm1", "norm2"))
    ungated = common.pop(Part.NEURONS)
    weights = vit.weights(layer)
    return Family(
        name=name,
        model_types=(name,),
        blocks=f"{name}.encoder.layer",
        inputs="pixels",
        parts={
            **common,
            **gated,
            Part.EMBED: Reach(path=f"{name}.embeddings.patch_embeddings", axes=("batch", "patch", "d_model")),
            Part.NEURONS: (ungated, Reach(path=f"{layer}.mlp.down_proj", side="input")),
            Part.ATTN_OUT: Reach(path=f"{layer}.layer_scale1"),
            Part.MLP_OUT: Reach(path=f"{layer}.layer_scale2"),
            Part.FINAL_NORM: Reach(path=f"{name}.layernorm"),
            Part.CLASS_LOGITS: Reach(path="classifier"),
        },
        optional=frozenset({Part.NEURONS_PRE, *gated}),
        weights={
            **weights,
            "W_gate": Weight(path=f"{layer}.mlp.gate_proj.weight"),
            "W_up": Weight(path=f"{layer}.mlp.up_proj.weight"),
            "W_down": (Weight(path=f"{layer}.mlp.fc2.weight"), Weight(path=f"{layer}.mlp.down_proj.weight")),
        },
        sizes={"class": "classifier.weight:0"},
        rules=(
            Rule(
                text="[CLS, mean of the patches] @ W_class == class_logits",
                result=Part.CLASS_LOGITS,
                inputs=(Part.FINAL_NORM,),
                function=_classify,
            ),
            Rule(
                text="act(neurons_pre) == neurons",
                result=Part.NEURONS,
                inputs=(Part.NEURONS_PRE,),
                function=lambda module, x: module.mlp.activation_fn(x),
            ),
        ),
        tiny=tiny,
        after_attn=f"{layer}.layer_scale1",
        after_mlp=f"{layer}.layer_scale2",
    )


def fields(sizes: Mapping[str, int], **more: Any) -> dict[str, Any]:
    return {**vit.fields(sizes), "mlp_ratio": 2, **more}


def _swiglu(sizes: Mapping[str, int]) -> dict[str, Any]:
    return fields(sizes, use_swiglu_ffn=True)


FAMILY = dinov2(
    "dinov2",
    {
        "dinov2": Tiny(config="Dinov2Config", model="Dinov2ForImageClassification", fields=fields),
        "dinov2-swiglu": Tiny(config="Dinov2Config", model="Dinov2ForImageClassification", fields=_swiglu),
    },
)
