"""What must hold between the sites of a model: products with its weights, sums of the stream, rules of its family.

The products use the table's weights, so these are proven too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from interp.core.sites import Part, Site
from interp.models.checks import Check, check, close, first_tensor, tolerance
from interp.models.family import OWNER
from interp.models.model import LoadedModel

LINEAR = (
    (Part.Q, Part.ATTN_IN, "W_Q"),
    (Part.K, Part.ATTN_IN, "W_K"),
    (Part.V, Part.ATTN_IN, "W_V"),
    (Part.GATE_PRE, Part.MLP_IN, "W_gate"),
    (Part.UP, Part.MLP_IN, "W_up"),
    (Part.NEURONS_PRE, Part.MLP_IN, "W_in"),
    (Part.ATTN_OUT, Part.Z, "W_O"),
    (Part.MLP_OUT, Part.NEURONS, "W_down"),
    (Part.ROUTER_LOGITS, Part.MLP_IN, "W_router"),
    (Part.SHARED_GATE_PRE, Part.MLP_IN, "W_shared_gate"),
    (Part.SHARED_UP, Part.MLP_IN, "W_shared_up"),
    (Part.SHARED_OUT, Part.SHARED_NEURONS, "W_shared_down"),
)
"""(result, input, weight): result == input @ weight + bias; what is added to the stream, through the norm after it."""


SUMS = (
    (Part.RESID_MID, Part.RESID_PRE, Part.ATTN_OUT),
    (Part.RESID_POST, Part.RESID_MID, Part.MLP_OUT),
)
"""(stream, stream before, what was added)."""


def identities(model: LoadedModel, values: dict[Site, Tensor]) -> Iterator[Check]:
    limit = tolerance(model.dtype)
    for layer in range(model.n_layers):
        local = {s.part: value for s, value in values.items() if s.layer == layer and s.path is None}
        yield from _linear(model, layer, local, limit)
        for stream, before, added in SUMS:
            if {stream, before, added} <= set(local):
                name = f"{before} + {added} == {stream}"
                yield close(name, f"{stream}.{layer}", local[before] + local[added], local[stream], limit)
        yield from _gate(model, layer, local, limit)
        after = values.get(Site(Part.RESID_PRE, layer + 1)) if layer + 1 < model.n_layers else None
        if after is not None and Part.RESID_POST in local:
            family = model.table.family
            scale = family.stream_scale(model.module, layer) if family and family.stream_scale else 1
            difference = float((local[Part.RESID_POST] * scale - after).abs().max())
            yield check("resid_post is the next block's resid_pre", f"resid_post.{layer}", difference, 0.0)
        of_family = model.table.family.rules if model.table.family else ()
        if Part.PATTERN in local and all(rule.result is not Part.PATTERN for rule in of_family):
            rows = local[Part.PATTERN].sum(-1)
            yield close("pattern rows sum to 1", f"pattern.{layer}", rows, torch.ones_like(rows), limit)
        if {Part.PATTERN, Part.V, Part.Z} <= set(local):
            mixed, name = _mix(local), "pattern @ v == z"
            if Part.ATTN_GATE in local:
                mixed, name = mixed * local[Part.ATTN_GATE], "attn_gate * (pattern @ v) == z"
            yield close(name, f"pattern.{layer}", mixed, local[Part.Z], limit)
    final = values.get(Site(Part.FINAL_NORM))
    name = Part.LOGITS_PRE if Site(Part.LOGITS_PRE) in values else Part.LOGITS
    logits = values.get(Site(name))
    if final is not None and logits is not None:
        yield close(f"final_norm @ W_U == {name}", str(name), _product(model, "W_U", None, final), logits, limit)


def rules(model: LoadedModel, values: dict[Site, Tensor], inputs: Any, limit: float) -> Iterator[Check]:
    """Identities of the family and of known blocks, wherever all their parts are."""
    table = model.table
    beside = _beside(model, inputs)
    groups: dict[tuple[str | None, int | None], dict[Part, Tensor]] = {}
    for site, value in values.items():
        if site.part is not Part.MODULE:
            groups.setdefault((site.path, site.layer), {})[site.part] = value
    for (path, layer), local in groups.items():
        rules = table.blocks[path].rules if path is not None else table.family.rules if table.family else ()
        for rule in rules:
            if {rule.result, *rule.inputs} <= set(local):
                site = Site(rule.result, layer, path=path)
                seen = [beside.get((path or "").partition("@")[0], {}).get(name) for name in rule.modules]
                with torch.no_grad():
                    left = rule.function(table.part_module(site), *(local[part] for part in rule.inputs), *seen)
                sides = left if isinstance(left, tuple) else (left, local[rule.result])
                yield close(rule.text, str(site), *sides, limit)


def _beside(model: LoadedModel, inputs: Any) -> dict[str, dict[str, Tensor]]:
    """What rules of blocks ask of modules, by block and name: from plain hooks in a forward without any of ours."""
    found: dict[str, dict[str, Tensor]] = {}
    handles: list[RemovableHandle] = []
    for path, name in {(p, name) for p, block in model.table.blocks.items() for r in block.rules for name in r.modules}:
        child: Any = model.table.part_module(Site(Part.MODULE, path=path))
        inner, _, side = name.partition("@")
        for step in filter(None, inner.split(".")):
            child = getattr(child, step, None)
        if isinstance(child, nn.Module):

            def keep(_module: nn.Module, args: Any, output: Any, at: tuple[str, str, str] = (path, name, side)) -> None:
                given = args if at[2] else output
                found.setdefault(at[0], {}).setdefault(at[1], first_tensor(given).detach().clone())

            handles.append(child.register_forward_hook(keep))
    try:
        if handles:
            args, named = model.arguments(inputs)
            with torch.no_grad():
                model.module(*args, **named)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _linear(model: LoadedModel, layer: int, local: dict[Part, Tensor], limit: float) -> Iterator[Check]:
    """Products with the weights as the table hands them out: this proves the table's weights too."""
    family = model.table.family
    for result, source, weight in LINEAR:
        if family is None or not model.table.has_weight(weight, layer) or not {result, source} <= set(local):
            continue
        left = _product(model, weight, layer, local[source])
        after = {Part.ATTN_OUT: family.after_attn, Part.MLP_OUT: family.after_mlp}.get(result)
        after = _owner(model, Site(result, layer)) if after == OWNER else after
        left = _run(model, after, layer, left) if after else left
        reach = model.table.reach(Site(result, layer))
        if result in (Part.Q, Part.K) and reach.path.endswith("_norm"):  # normed head by head, or all heads at once
            heads = local[result].shape[-2:]
            left = _run(model, reach.path, layer, left if reach.heads else left.unflatten(-1, heads))
            left = left if reach.heads else left.flatten(-2)
        right = local[result].flatten(-2) if result in (Part.Q, Part.K, Part.V) else local[result]
        yield close(f"{source} @ {weight} == {result}", f"{result}.{layer}", left, right, limit)


def _gate(model: LoadedModel, layer: int, local: dict[Part, Tensor], limit: float) -> Iterator[Check]:
    act = model.table.family.act if model.table.family else None
    if {Part.GATE, Part.UP, Part.NEURONS} <= set(local):
        product = local[Part.GATE] * local[Part.UP]
        yield close("gate * up == neurons", f"neurons.{layer}", product, local[Part.NEURONS], limit)
    for before, result in ((Part.GATE_PRE, Part.GATE), (Part.NEURONS_PRE, Part.NEURONS)):
        if act and act.format(layer=layer) in model.table.modules and {before, result} <= set(local):
            name, left = f"act({before}) == {result}", _run(model, act, layer, local[before])
            yield close(name, f"{result}.{layer}", left, local[result], limit)


def _product(model: LoadedModel, name: str, layer: int | None, x: Tensor) -> Tensor:
    weight, bias = model.weight(name, layer).detach(), model.table.bias(name, layer)
    x = x.to(weight.dtype)  # a stream kept in float32 is rounded where a half-precision weight reads it
    left = x.flatten(-2) @ weight.flatten(0, 1) if weight.ndim == 3 else x @ weight
    return left if bias is None else left + bias.detach()


def _owner(model: LoadedModel, site: Site) -> str | None:
    """The norm whose hook point the site is; `None` if it is a hook point of something else."""
    owner = model.table.canonical(model.table.reach(site).path).rpartition(".")[0]
    return owner if "norm" in type(model.module.get_submodule(owner)).__name__.lower() else None


def _run(model: LoadedModel, path: str, layer: int, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.module.get_submodule(path.format(layer=layer))(x)


def _mix(local: dict[Part, Tensor]) -> Tensor:
    pattern, values = local[Part.PATTERN], local[Part.V]
    group = pattern.shape[1] // values.shape[2]
    return torch.einsum("bhqk,bkhd->bqhd", pattern, values.repeat_interleave(group, dim=2))
