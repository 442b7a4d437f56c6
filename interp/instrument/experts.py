"""Edits of a mixture of experts: switch experts off, or force them on.

    with edited(model, [switch_off("router_weights.3", [1, 5]), force_on("router_weights.4", 2)]) as receipt:
        model(tokens)

Three ways to switch a set S off differ in what the token gets instead (Dahlke et al., arXiv:2502.11096, use the first):
- `renormalise`: the weights of S become 0 and the other chosen ones are scaled up to the former sum; nobody comes in;
- `drop`: the weights of S become 0, the rest stays, so that the routed output shrinks;
- `replace`: the router's scores of S fall below all others before the choice, so that other experts enter.

A token none of whose experts is in S keeps its bits. If all are, the routed output is 0 (a shared expert stays).
`force_on` gives an expert that was not chosen the slot of the weakest one and scales the weights to the former sum.
Beware: a router with a bias that counts for the choice only (DeepSeek V3) may still choose an expert in `replace`, with
weight 0. Report renormalise and replace both: they answer different questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace as with_changes
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.core.errors import InterpError, unknown
from interp.core.sites import Part, Site
from interp.instrument.edits import Context, Edit
from interp.instrument.select import chosen_numbers

__all__ = ["force_on", "switch_off", "usual_weights"]

How = Literal["renormalise", "drop", "replace"]
FALL = 1e4
"""How far below all others `replace` puts a score: the softmax of it is 0 in any dtype, and float16 can hold it."""


def switch_off(site: str | Site, experts: int | Sequence[int], how: How = "renormalise", **where: Any) -> Edit:
    """Weight 0 for these experts. `site` is a layer's router, e.g. `router_weights.3` or `router_weights.*`."""
    listed = _listed(experts)
    if how not in ("renormalise", "drop", "replace"):
        raise unknown("way to switch experts off", how, ["renormalise", "drop", "replace"])

    def weights(x: Tensor, context: Context) -> Tensor:
        mine = _mask(listed, x, context.site)
        kept = x.masked_fill(mine, 0)
        if how == "drop":
            return kept
        return torch.where(((x != 0) & mine).any(-1, keepdim=True), _to_sum(kept, x), x)

    def scores(x: Tensor, context: Context) -> Tensor:
        mine = _mask(listed, x, context.site)
        if bool(mine.all()):
            raise InterpError(f"no expert of {context.site} is left to replace the others; use how='drop'")
        return torch.where(mine, x.amin(-1, keepdim=True) - FALL, x)

    part, function = (Part.ROUTER_LOGITS, scores) if how == "replace" else (Part.ROUTER_WEIGHTS, weights)
    return Edit(_router(site, part), function, label=f"switch_off({how})", **where)


def force_on(
    site: str | Site, experts: int | Sequence[int], weight: float | Tensor | None = None, **where: Any
) -> Edit:
    """These experts are among the chosen of every token; where one comes in, the weakest of the others goes.

    weight: what one that comes in gets before the weights are scaled to the former sum: a number, or one for each
    expert of the model (expert,), see `usual_weights`; by default the mean of the token's chosen ones. A token that
    has chosen them all keeps its bits.
    """
    listed = _listed(experts)

    def function(x: Tensor, context: Context) -> Tensor:
        mine, chosen = _mask(listed, x, context.site), x != 0
        n_chosen = chosen.sum(-1, keepdim=True)
        if len(listed) > int(n_chosen.max()):
            raise InterpError(
                f"{len(listed)} experts are forced on at {context.site}, where a token has {int(n_chosen.max())}; "
                "force fewer, or edit router_weights with set_to"
            )
        incoming = mine & ~chosen
        others = torch.where(chosen & ~mine, x, torch.inf)
        rank = others.argsort(dim=-1).argsort(dim=-1)
        leaving = (rank < incoming.sum(-1, keepdim=True)) & others.isfinite()
        new = torch.where(incoming, _given(weight, x, n_chosen, context.site), x.masked_fill(leaving, 0))
        return torch.where(incoming.any(-1, keepdim=True), _to_sum(new, x), x)

    return Edit(_router(site, Part.ROUTER_WEIGHTS), function, label="force_on", **where)


def usual_weights(weights: Float[Tensor, "*tokens expert"]) -> Float[Tensor, " expert"]:
    """Each expert's mean weight over the tokens that chose it; the mean over all chosen for one that nobody did."""
    flat = weights.flatten(0, -2)
    counts = (flat != 0).sum(0)
    total = flat.sum() / counts.sum().clamp_min(1)
    return torch.where(counts > 0, flat.sum(0) / counts.clamp_min(1), total)


def _listed(experts: int | Sequence[int]) -> list[int]:
    return list(dict.fromkeys(chosen_numbers("experts", experts, none=True)))


def _router(site: str | Site, part: Part) -> str | Site:
    """The part of the router that an edit works on, whichever of the two was named."""
    if isinstance(site, Site):
        if site.part not in (Part.ROUTER_LOGITS, Part.ROUTER_WEIGHTS):
            raise InterpError(f"{site} is no router; name router_weights, e.g. router_weights.{site.layer or 0}")
        return with_changes(site, part=part)
    stem, dot, layers = site.partition(".")
    if stem not in (Part.ROUTER_LOGITS, Part.ROUTER_WEIGHTS):
        raise InterpError(f"{site!r} is no router; name router_weights, e.g. router_weights.{layers or 0}")
    return f"{part}{dot}{layers}"


def _mask(experts: list[int], x: Tensor, site: Site) -> Bool[Tensor, " expert"]:
    outside = [expert for expert in experts if not 0 <= expert < x.shape[-1]]
    if outside:
        raise InterpError(f"no expert {outside[0]} at {site}: it has experts 0 to {x.shape[-1] - 1}")
    mask = torch.zeros(x.shape[-1], dtype=torch.bool, device=x.device)
    mask[experts] = True
    return mask


def _given(weight: float | Tensor | None, x: Tensor, n_chosen: Tensor, site: Site) -> Tensor:
    if weight is None:
        return x.sum(-1, keepdim=True) / n_chosen.clamp_min(1)
    given = torch.as_tensor(weight).to(x)
    if given.ndim > 1 or given.shape not in ((), (x.shape[-1],)):
        raise InterpError(f"weights of shape {tuple(given.shape)} do not fit {site}: give one, or {x.shape[-1]}")
    if not bool((given > 0).all()):
        raise InterpError(f"a weight of {float(given.min()):g} does not force an expert on; it must be above 0")
    return given


def _to_sum(new: Tensor, old: Tensor) -> Tensor:
    """Scaled to the sum of the old weights; 0 stays 0."""
    total = new.sum(-1, keepdim=True)
    return torch.where(total != 0, new * (old.sum(-1, keepdim=True) / torch.where(total != 0, total, 1)), new)
