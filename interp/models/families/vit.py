"""ViT for image classification: pre-norm blocks, bidirectional attention, ungated GELU MLP; the class reads CLS.

`embed` holds the patches alone, before CLS and positions are added; from `resid_pre.0` on, position 0 is CLS and the
patches follow row by row. `interp.models.patches` says which position is which patch of the image.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from interp.core.sites import Part
from interp.models.family import Family, Reach, Rule, Tiny, Weight


def parts(layer: str, norms: tuple[str, str]) -> dict[Part, Reach]:
    """What the blocks of ViT and DINOv2 in transformers have in common."""
    return {
        Part.RESID_PRE: Reach(path=layer, side="input"),
        Part.ATTN_IN: Reach(path=f"{layer}.{norms[0]}"),
        Part.Q: Reach(path=f"{layer}.attention.q_proj", heads="n_heads"),
        Part.K: Reach(path=f"{layer}.attention.k_proj", heads="n_kv_heads"),
        Part.V: Reach(path=f"{layer}.attention.v_proj", heads="n_kv_heads"),
        Part.ATTN_SCORES: Reach(path=f"{layer}.attention", side="attention"),
        Part.PATTERN: Reach(path=f"{layer}.attention", side="attention"),
        Part.Z: Reach(path=f"{layer}.attention.o_proj", side="input", heads="n_heads"),
        Part.RESID_MID: Reach(path=f"{layer}.{norms[1]}", side="input", carry=layer),
        Part.MLP_IN: Reach(path=f"{layer}.{norms[1]}"),
        Part.NEURONS_PRE: Reach(path=f"{layer}.mlp.fc1"),
        Part.NEURONS: Reach(path=f"{layer}.mlp.fc2", side="input"),
        Part.RESID_POST: Reach(path=layer),
    }


def weights(layer: str) -> dict[str, Weight]:
    return {
        "W_Q": Weight(path=f"{layer}.attention.q_proj.weight"),
        "W_K": Weight(path=f"{layer}.attention.k_proj.weight"),
        "W_V": Weight(path=f"{layer}.attention.v_proj.weight"),
        "W_O": Weight(path=f"{layer}.attention.o_proj.weight", heads="n_heads"),
        "W_in": Weight(path=f"{layer}.mlp.fc1.weight"),
        "W_down": Weight(path=f"{layer}.mlp.fc2.weight"),
        "W_class": Weight(path="classifier.weight"),
    }


def fields(sizes: Mapping[str, int]) -> dict[str, Any]:
    """Config fields of a tiny model: 4 x 4 patches of 4 x 4 pixels."""
    return {
        "hidden_size": sizes["d_model"], "num_hidden_layers": sizes["n_layers"], "num_labels": 7, "image_size": 16,
        "num_attention_heads": sizes["n_heads"], "patch_size": 4, "num_channels": 3,
    }  # fmt: skip


def _vit_fields(sizes: Mapping[str, int]) -> dict[str, Any]:
    return {**fields(sizes), "intermediate_size": sizes["d_mlp"]}


def _classify(module: nn.Module, stream: Tensor) -> Tensor:
    head = module.get_submodule("classifier")
    return stream[:, 0] @ head.get_parameter("weight").T + head.get_parameter("bias")


LAYER = "vit.layers.{layer}"

FAMILY = Family(
    name="vit",
    model_types=("vit",),
    blocks="vit.layers",
    inputs="pixels",
    parts={
        **parts(LAYER, ("layernorm_before", "layernorm_after")),
        Part.EMBED: Reach(path="vit.embeddings.patch_embeddings", axes=("batch", "patch", "d_model")),
        Part.ATTN_OUT: Reach(path=f"{LAYER}.attention"),
        Part.MLP_OUT: Reach(path=f"{LAYER}.mlp"),
        Part.FINAL_NORM: Reach(path="vit.layernorm"),
        Part.CLASS_LOGITS: Reach(path="classifier"),
    },
    weights=weights(LAYER),
    sizes={"class": "classifier.weight:0"},
    rules=(
        Rule(
            text="final_norm of CLS @ W_class == class_logits",
            result=Part.CLASS_LOGITS,
            inputs=(Part.FINAL_NORM,),
            function=_classify,
        ),
    ),
    tiny={"vit": Tiny(config="ViTConfig", model="ViTForImageClassification", fields=_vit_fields)},
    act=f"{LAYER}.mlp.activation_fn",
    down=f"{LAYER}.mlp.fc2",
    out=f"{LAYER}.attention.o_proj",
)
