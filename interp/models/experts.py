"""Mixture of experts: how routers and experts of transformers are read, edited and proven.

A router module returns (logits, weights, experts) with one row per token: scores of all E experts, and the weights and
numbers of the K chosen ones. The experts module takes (x, experts, weights) and returns sum over k of
weight_k * expert_k(x), computed in one fused call (`experts_implementation` grouped_mm, batched_mm or eager).

- `router_logits` is what the linear function inside the router returns, so that the choice follows an edit.
- `router_weights` is the router's output as one row of E weights, 0 where an expert was not chosen. Writing 0 switches
  an expert off; a weight on an expert that was not chosen forces it on: it takes the slot of one that is off, and if
  there is none, the token gets one slot more, which the experts modules of transformers allow.
- What happens inside the experts is a replay, each value (batch, pos, slot, ...): slot k holds what expert
  `router_experts[..., k]` computes. A rule proves it: sum of weight * expert_out == routed_out.

Every token is routed, also padding. Traps: weights are float32 in some models whose activations are not; a choice
flips where two experts are nearly tied; gradients reach the weights of chosen experts only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from interp.core.errors import SiteError
from interp.core.sites import Part
from interp.models.family import ModuleCall, Reach, Replay, Rule, Tap, View, Weight

RouterOutput = tuple[Tensor, Tensor, Tensor]
"""(logits (token, expert), weights (token, slot), experts (token, slot))."""


def _read_weights(_router: nn.Module, output: RouterOutput) -> Tensor:
    logits, weights, experts = output
    return weights.new_zeros(logits.shape).scatter(-1, experts, weights)


def _write_weights(_router: nn.Module, output: RouterOutput, new: Tensor) -> RouterOutput:
    logits, _, experts = output
    experts = _slots(experts, new.detach() != 0)
    return logits, new.gather(-1, experts), experts


def _slots(experts: Tensor, on: Tensor) -> Tensor:
    """Expert numbers (token, slot) such that every expert that is on (token, expert) has a slot.

    Tokens keep their slots unless an expert has to come in: then those that stay come first, the new ones after them.
    """
    chosen = torch.zeros_like(on).scatter(-1, experts, value=True)
    forced = (on & ~chosen).any(-1)
    if not bool(forced.any()):
        return experts
    n_experts, n_slots = on.shape[-1], experts.shape[-1]
    slot = torch.full(on.shape, n_slots, device=on.device)
    slot = slot.scatter(-1, experts, torch.arange(n_slots, device=on.device).expand_as(experts))
    rank = torch.arange(n_experts, device=on.device) + n_slots
    order = torch.where(chosen, slot, rank) + (~on) * 2 * (n_experts + n_slots)
    untouched = torch.where(chosen, slot, rank)
    order = torch.where(forced[:, None], order, untouched).argsort(dim=-1)
    return order[:, : max(n_slots, int(on.sum(-1).max()))]


ROUTER_WEIGHTS = View(read=_read_weights, write=_write_weights)


def experts_replay(
    gate: Callable[[Any, Tensor], Tensor] | None = None, up: Callable[[Any, Tensor], Tensor] | None = None
) -> Replay:
    """A replay of an experts module. `gate` and `up` turn the two projections into the factors of the product; by
    default act_fn and nothing. Each gets the module.
    """

    def replay(call: ModuleCall, tap: Tap) -> Tensor:
        module = _replayable(call.module)
        x, experts, weights = (*call.args, *call.kwargs.values())
        rows = call.n_rows or 1

        def shown(part: Part, value: Tensor) -> Tensor:
            return tap(part, value.unflatten(0, (rows, -1))).flatten(0, 1)

        pairs = x[:, None].expand(*experts.shape, -1)
        both = _of_experts(module, "gate_up_proj", pairs, experts)
        before, other = both.chunk(2, dim=-1) if _concatenated(module) else (both[..., ::2], both[..., 1::2])
        before = shown(Part.EXPERT_GATE_PRE, before.contiguous())  # as a copy of it would be: rounding depends on it
        opened = shown(Part.EXPERT_GATE, gate(module, before) if gate else module.act_fn.forward(before))
        other = shown(Part.EXPERT_UP, up(module, other) if up else other.contiguous())
        neurons = shown(Part.EXPERT_NEURONS, opened * other)
        out = shown(Part.EXPERT_OUT, _of_experts(module, "down_proj", neurons, experts))
        return (out * weights[..., None]).sum(1).to(x.dtype)

    return replay


def _replayable(module: nn.Module) -> Any:
    """The module, if its weights are plain gate_up_proj and down_proj that this process holds all of."""
    plain = all(
        isinstance(weight := getattr(module, name, None), Tensor) and weight.is_floating_point() and weight.ndim == 3
        for name in ("gate_up_proj", "down_proj")
    )
    if not plain or getattr(module, "_is_expert_parallel", False):
        reason = "spread over processes" if plain else "not held as plain tensors (quantised, say)"
        raise SiteError(
            f"what happens inside {type(module).__name__} cannot be computed beside it: its weights are {reason}; "
            "router_logits, router_weights and routed_out can be captured"
        )
    return module


def fit_dtype(module: nn.Module, dtype: torch.dtype) -> None:
    """The grouped kernel, transformers' default for experts, knows no float64: such models loop over their experts."""
    kind = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if dtype is torch.float64 and kind == "grouped_mm":
        cast(Any, module).set_experts_implementation("eager")


def _concatenated(module: Any) -> bool:
    return getattr(module, "is_concatenated", True)


def _of_experts(module: Any, name: str, x: Tensor, experts: Tensor) -> Tensor:
    """Each pair's x (token, slot, d_in) times the weight of its expert, plus its bias."""
    weight = getattr(module, name)
    weight = weight if getattr(module, "is_transposed", False) else weight.mT
    bias = getattr(module, f"{name}_bias", None)
    order = experts.flatten().argsort(stable=True)
    counts: list[int] = experts.flatten().bincount(minlength=len(weight)).tolist()
    groups = x.flatten(0, 1)[order].split(counts)
    done = [
        group @ weight[e] if bias is None else group @ weight[e] + bias[e]
        for e, group in enumerate(groups)
        if counts[e]
    ]
    return torch.cat(done)[order.argsort()].unflatten(0, experts.shape)


def router_parts(mlp: str, router: str = "gate", replay: Replay | None = None) -> dict[Part, Reach]:
    """Sites of a mixture at `mlp`: the router at `router`, the experts at `experts`."""
    gate, experts, program = f"{mlp}.{router}", f"{mlp}.experts", replay or DEFAULT_REPLAY
    inside = (Part.EXPERT_GATE_PRE, Part.EXPERT_GATE, Part.EXPERT_UP, Part.EXPERT_NEURONS, Part.EXPERT_OUT)
    return {
        Part.ROUTER_LOGITS: Reach(path=gate, side="op", op="linear", flat=True),
        Part.ROUTER_EXPERTS: Reach(path=gate, item=2, flat=True, instead=Part.ROUTER_LOGITS),
        Part.ROUTER_WEIGHTS: Reach(path=gate, view=ROUTER_WEIGHTS, whole=True, flat=True),
        **{part: Reach(path=experts, side="replay", replay=program) for part in inside},
        Part.ROUTED_OUT: Reach(path=experts, flat=True),
    }


def shared_parts(path: str, *, flat: bool) -> dict[Part, Reach]:
    """Sites of a shared expert, a gated MLP that every token passes."""
    return {
        Part.SHARED_GATE_PRE: Reach(path=f"{path}.gate_proj", flat=flat),
        Part.SHARED_GATE: Reach(path=f"{path}.act_fn", flat=flat),
        Part.SHARED_UP: Reach(path=f"{path}.up_proj", flat=flat),
        Part.SHARED_NEURONS: Reach(path=f"{path}.down_proj", side="input", flat=flat),
        Part.SHARED_OUT: Reach(path=path, flat=flat),
    }


def router_weights(mlp: str, router: str = "gate") -> dict[str, Weight]:
    """W_router (d_model, expert); the experts' weights (expert, d_in, d_out)."""
    return {
        "W_router": Weight(path=f"{mlp}.{router}.weight"),
        "W_expert_gate": Weight(path=f"{mlp}.experts.gate_up_proj", chunk=(0, 2)),
        "W_expert_up": Weight(path=f"{mlp}.experts.gate_up_proj", chunk=(1, 2)),
        "W_expert_down": Weight(path=f"{mlp}.experts.down_proj"),
    }


def shared_weights(path: str) -> dict[str, Weight]:
    return {
        "W_shared_gate": Weight(path=f"{path}.gate_proj.weight"),
        "W_shared_up": Weight(path=f"{path}.up_proj.weight"),
        "W_shared_down": Weight(path=f"{path}.down_proj.weight"),
    }


def sizes(mlp: str, router: str = "gate", shared: str | None = None) -> Mapping[str, str]:
    """Where the sizes of a mixture's axes are."""
    found = {
        "expert": f"{mlp}.{router}.weight:0",
        "slot": f"{mlp}.{router}.top_k",
        "d_expert": f"{mlp}.experts.down_proj:2",
    }
    return found | ({"d_shared": f"{shared}.down_proj.weight:1"} if shared else {})


def _routed(_layer: nn.Module, weights: Tensor, experts: Tensor, out: Tensor) -> Tensor:
    return (weights.gather(-1, experts)[..., None] * out).sum(2).to(out.dtype)


def _gate_pre(layer: Any, x: Tensor, experts: Tensor) -> Tensor:
    """Expert by expert, from the raw parameter: rows of gate_up_proj[e] are outputs, the gate's first."""
    weight: Tensor = layer.mlp.experts.gate_up_proj
    width = weight.shape[1] // 2
    result = x.new_zeros(*experts.shape, width)
    for e in experts.unique().tolist():
        batch, pos, slot = torch.where(experts == e)
        result[batch, pos, slot] = torch.nn.functional.linear(x[batch, pos], weight[e, :width])
    return result


def _softmax_weights(layer: Any, logits: Tensor, experts: Tensor) -> Tensor:
    """Softmax over all experts, kept where chosen; made to sum to 1 again where the model does so."""
    router: Any = layer.mlp.gate if hasattr(layer.mlp, "gate") else layer.mlp.router
    kept = torch.zeros_like(logits).scatter(-1, experts, 1.0) * logits.softmax(-1)
    if getattr(router, "norm_topk_prob", True):
        kept = kept / kept.sum(-1, keepdim=True)
    return kept


def _sigmoid_weights(layer: Any, logits: Tensor, experts: Tensor) -> Tensor:
    """Sigmoid of each expert's score, kept where chosen."""
    router = layer.mlp.gate
    kept = torch.zeros_like(logits).scatter(-1, experts, 1.0) * logits.sigmoid()
    if router.norm_topk_prob:
        kept = kept / kept.sum(-1, keepdim=True)
    return kept * router.routed_scaling_factor


SUM_RULE = Rule(
    text="sum of weight * expert_out == routed_out",
    result=Part.ROUTED_OUT,
    inputs=(Part.ROUTER_WEIGHTS, Part.ROUTER_EXPERTS, Part.EXPERT_OUT),
    function=_routed,
)
SOFTMAX_RULE = Rule(
    text="softmax(router_logits) of the chosen == router_weights",
    result=Part.ROUTER_WEIGHTS,
    inputs=(Part.ROUTER_LOGITS, Part.ROUTER_EXPERTS),
    function=_softmax_weights,
)
SIGMOID_RULE = Rule(
    text="sigmoid(router_logits) of the chosen == router_weights",
    result=Part.ROUTER_WEIGHTS,
    inputs=(Part.ROUTER_LOGITS, Part.ROUTER_EXPERTS),
    function=_sigmoid_weights,
)
GATE_RULE = Rule(
    text="mlp_in @ W_gate of each chosen expert == expert_gate_pre",
    result=Part.EXPERT_GATE_PRE,
    inputs=(Part.MLP_IN, Part.ROUTER_EXPERTS),
    function=_gate_pre,
)
SHARED_RULE = Rule(
    text="routed_out + shared_out == mlp_out",
    result=Part.MLP_OUT,
    inputs=(Part.ROUTED_OUT, Part.SHARED_OUT),
    function=lambda _layer, routed, shared: routed + shared,
)
DEFAULT_REPLAY = experts_replay()
