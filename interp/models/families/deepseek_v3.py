"""DeepSeek V2 and V3: latent attention, first layers dense, then routed experts beside shared ones.

Keys and values of all heads come from one small vector per token, `kv_latent`, which is also what the cache holds: the
model computes `k` and `v` again from it for all positions at every step. So these two can only be read; edit
`kv_latent`. `k` is the part of a head's keys that does not rotate; the part that does, `k_rotary`, is shared by all
heads. A head of `q` holds first the one, then the other: its width differs from that of `v` and `z`.
V3 scores experts by sigmoids, adds a bias for the choice only, and chooses groups of experts first.
"""

from collections.abc import Mapping
from typing import Any

import torch

from interp.core.sites import Part
from interp.models.experts import (
    GATE_RULE,
    SHARED_RULE,
    SIGMOID_RULE,
    SUM_RULE,
    router_parts,
    router_weights,
    shared_parts,
    shared_weights,
    sizes,
)  # fmt: skip
from interp.models.families.llama import BLOCK, BLOCK_PARTS, WEIGHTS, llama_fields
from interp.models.families.mixtral import DENSE, MLP
from interp.models.family import Family, Reach, Rule, Tiny, View, Weight

ATTN = f"{BLOCK}.self_attn"
SHARED = f"{MLP}.shared_experts"
LATENT = ("d_latent", "d_rotary")
PER_HEAD = ("d_nope", "d_head")
WITHOUT_ONE = View(read=lambda _module, x: x.squeeze(1), write=lambda _module, _x, new: new.unsqueeze(1))
"""kv_b_proj sees one head of latents: (batch, 1, pos, ...)."""


def _from_latent(piece: int, axes: tuple[str, ...]) -> Reach:
    return Reach(
        path=f"{ATTN}.kv_b_proj", view=WITHOUT_ONE, heads="n_heads", chunk=(piece, PER_HEAD), within_heads=True,
        recent=True, instead=Part.KV_LATENT, axes=axes,
    )  # fmt: skip


ATTENTION = {
    Part.Q_LATENT: Reach(path=f"{ATTN}.q_a_layernorm"),
    Part.KV_LATENT: Reach(path=f"{ATTN}.kv_a_layernorm"),
    Part.K_ROTARY: Reach(path=f"{ATTN}.kv_a_proj_with_mqa", chunk=(1, LATENT)),
    Part.Q: (
        Reach(path=f"{ATTN}.q_proj", heads="n_heads", axes=("batch", "pos", "head", "d_qk")),
        Reach(path=f"{ATTN}.q_b_proj", heads="n_heads", axes=("batch", "pos", "head", "d_qk")),
    ),
    Part.K: _from_latent(0, ("batch", "pos", "head", "d_nope")),
    Part.V: _from_latent(1, ("batch", "pos", "head", "d_head")),
}


def _queries(layer: Any, latent: torch.Tensor) -> torch.Tensor:
    attention = layer.self_attn
    return (latent @ attention.q_b_proj.weight.T).unflatten(-1, (attention.num_heads, attention.qk_head_dim))


def _expanded(layer: Any, latent: torch.Tensor) -> torch.Tensor:
    attention = layer.self_attn
    weight = attention.kv_b_proj.weight.view(attention.num_heads, -1, attention.kv_lora_rank)
    return torch.einsum("hdr, bpr -> bphd", weight, latent)


def _keys(layer: Any, latent: torch.Tensor) -> torch.Tensor:
    return _expanded(layer, latent)[..., : layer.self_attn.qk_nope_head_dim]


def _values(layer: Any, latent: torch.Tensor) -> torch.Tensor:
    return _expanded(layer, latent)[..., layer.self_attn.qk_nope_head_dim :]


def _rotary_keys(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return x @ layer.self_attn.kv_a_proj_with_mqa.weight[layer.self_attn.kv_lora_rank :].T


LATENT_RULES = (
    Rule(text="q_latent @ W_Q_up == q", result=Part.Q, inputs=(Part.Q_LATENT,), function=_queries),
    Rule(text="kv_latent @ W_K_up == k", result=Part.K, inputs=(Part.KV_LATENT,), function=_keys),
    Rule(text="kv_latent @ W_V_up == v", result=Part.V, inputs=(Part.KV_LATENT,), function=_values),
    Rule(text="attn_in @ W_K_rotary == k_rotary", result=Part.K_ROTARY, inputs=(Part.ATTN_IN,), function=_rotary_keys),
)


def latent_fields(of: Mapping[str, int], **more: Any) -> dict[str, Any]:
    """Config fields of a tiny model: a dense layer first, then eight experts in two groups and one shared expert."""
    return llama_fields(
        of, num_key_value_heads=of["n_heads"], qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=8, kv_lora_rank=14,
        n_routed_experts=8, num_experts_per_tok=3, n_group=2, topk_group=1, moe_intermediate_size=16,
        n_shared_experts=1, first_k_dense_replace=1, **more,
    )  # fmt: skip


def _v3_fields(of: Mapping[str, int]) -> dict[str, Any]:
    return latent_fields(of, q_lora_rank=10, routed_scaling_factor=1.5)


FAMILY = Family(
    name="deepseek-v3",
    model_types=("deepseek_v3",),
    blocks="model.layers",
    parts={**BLOCK_PARTS, **ATTENTION, **router_parts(MLP), **shared_parts(SHARED, flat=False)},
    weights={
        **{name: weight for name, weight in WEIGHTS.items() if name not in ("W_K", "W_V")},
        "W_Q_down": Weight(path=f"{ATTN}.q_a_proj.weight"),
        "W_Q_up": Weight(path=f"{ATTN}.q_b_proj.weight"),
        "W_KV_down": Weight(path=f"{ATTN}.kv_a_proj_with_mqa.weight", chunk=(0, LATENT)),
        "W_K_rotary": Weight(path=f"{ATTN}.kv_a_proj_with_mqa.weight", chunk=(1, LATENT)),
        "W_KV_up": Weight(path=f"{ATTN}.kv_b_proj.weight"),
        **router_weights(MLP),
        **shared_weights(SHARED),
    },
    optional=frozenset({*DENSE, Part.Q_LATENT}),
    sizes={
        **sizes(MLP, shared=SHARED),
        "d_qk": f"{ATTN}.qk_head_dim",
        "d_nope": f"{ATTN}.qk_nope_head_dim",
        "d_rotary": f"{ATTN}.qk_rope_head_dim",
        "d_latent": f"{ATTN}.kv_lora_rank",
        "d_q_latent": f"{ATTN}.q_a_layernorm.weight:0",
    },
    rules=(SUM_RULE, SIGMOID_RULE, GATE_RULE, SHARED_RULE, *LATENT_RULES),
    tiny={"deepseek-v3": Tiny(config="DeepseekV3Config", model="DeepseekV3ForCausalLM", fields=_v3_fields)},
    act=f"{MLP}.act_fn",
    down=f"{MLP}.down_proj",
    out=f"{ATTN}.o_proj",
)
