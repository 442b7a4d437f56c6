"""gpt-oss: attention with a learnt sink per head, and a mixture of experts with clamped gates and biases.

With g = min(x W_gate + b, limit) and u = x W_up + b in [-limit, limit], an expert's neurons are g sigmoid(alpha g)
(u + 1): `expert_gate_pre` is before the clamp, `expert_gate` is g sigmoid(alpha g), and `expert_up` is u + 1, what the
gate is multiplied with. A row of `pattern` sums to less than 1: the head's sink, a learnt score, takes the rest.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from interp.core.sites import Part
from interp.models.experts import GATE_RULE, SOFTMAX_RULE, SUM_RULE, experts_replay, router_parts, router_weights, sizes
from interp.models.families.llama import BLOCK, llama_fields
from interp.models.families.mixtral import ENDS_AND_ATTENTION, MLP, WITHOUT_MLP
from interp.models.family import Family, Rule, Tiny, Weight

ROUTER = "router"


def _gate(module: Any, before: torch.Tensor) -> torch.Tensor:
    clamped = before.clamp(max=module.limit)
    return clamped * torch.sigmoid(clamped * module.alpha)


def _up(module: Any, x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-module.limit, module.limit) + 1


def _gate_pre(layer: Any, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    module = layer.mlp.experts
    weight, bias = module.gate_up_proj[experts][..., ::2], module.gate_up_proj_bias[experts][..., ::2]
    return torch.einsum("bpd, bpkdm -> bpkm", x, weight) + bias


def _pattern(layer: Any, scores: torch.Tensor) -> torch.Tensor:
    """exp(score) / (sum of exp(scores) + exp(sink))."""
    sinks = layer.self_attn.sinks[None, :, None, None]
    top = torch.maximum(scores.amax(-1, keepdim=True), sinks)
    mass = torch.exp(scores - top)
    return mass / (mass.sum(-1, keepdim=True) + torch.exp(sinks - top))


SINK_RULE = Rule(
    text="softmax(attn_scores, sink) without the sink == pattern",
    result=Part.PATTERN,
    inputs=(Part.ATTN_SCORES,),
    function=_pattern,
)
REPLAY = experts_replay(_gate, _up)
PROJECTION = Weight(
    path=f"{MLP}.experts.gate_up_proj", bias=f"{MLP}.experts.gate_up_proj_bias", transpose=False, interleaved=True
)


def _fields(of: Mapping[str, int]) -> dict[str, Any]:
    return llama_fields(
        of, head_dim=of["d_head"], num_local_experts=6, num_experts_per_tok=2, sliding_window=8, swiglu_limit=2.0,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )  # fmt: skip


FAMILY = Family(
    name="gpt-oss",
    model_types=("gpt_oss",),
    blocks="model.layers",
    parts={**WITHOUT_MLP, **router_parts(MLP, ROUTER, REPLAY)},
    weights={
        **ENDS_AND_ATTENTION,
        **router_weights(MLP, ROUTER),
        "W_expert_gate": replace(PROJECTION, chunk=(0, 2)),
        "W_expert_up": replace(PROJECTION, chunk=(1, 2)),
        "W_expert_down": Weight(path=f"{MLP}.experts.down_proj", bias=f"{MLP}.experts.down_proj_bias", transpose=False),
    },
    sizes={**sizes(MLP, ROUTER), "d_expert": f"{MLP}.experts.down_proj:1"},
    rules=(SINK_RULE, SUM_RULE, SOFTMAX_RULE, replace(GATE_RULE, function=_gate_pre)),
    tiny={"gpt-oss": Tiny(config="GptOssConfig", model="GptOssForCausalLM", fields=_fields)},
    out=f"{BLOCK}.self_attn.o_proj",
)
