"""DeepSeek V2: V3's layout; the router takes a softmax, and small models project queries in one step."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from interp.models.experts import SIGMOID_RULE, SOFTMAX_RULE
from interp.models.families import deepseek_v3
from interp.models.family import Tiny


def _fields(of: Mapping[str, int]) -> dict[str, Any]:
    return deepseek_v3.latent_fields(of, q_lora_rank=None, topk_method="group_limited_greedy")


def _weights(layer: Any, logits: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """Softmax over all experts, kept where chosen: the weights do not sum to 1."""
    chosen = torch.zeros_like(logits).scatter(-1, experts, 1.0)
    return chosen * logits.softmax(-1) * layer.mlp.gate.routed_scaling_factor


FAMILY = replace(
    deepseek_v3.FAMILY,
    name="deepseek-v2",
    model_types=("deepseek_v2",),
    rules=tuple(
        replace(SOFTMAX_RULE, function=_weights) if rule is SIGMOID_RULE else rule for rule in deepseek_v3.FAMILY.rules
    ),
    tiny={"deepseek-v2": Tiny(config="DeepseekV2Config", model="DeepseekV2ForCausalLM", fields=_fields)},
)
