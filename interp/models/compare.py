"""Two forms of one network: by how much do their values differ, part by part?

`verify(model, reference=other)` runs both on the same input and compares every site that both have: a TransformerBridge
or a HookedTransformer with the Hugging Face model it was made from, quantised weights with the original ones. The
number is the largest difference relative to the reference's largest value; what rounding through many layers explains
passes. Weights that were folded or centred (TransformerLens' `from_pretrained`) move values for real, and that shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from interp.core.errors import InterpError
from interp.core.sites import Part, Site
from interp.models.model import LoadedModel
from interp.models.probe import Check, captured

MASKED = -1e30
"""Scores below this are masked; some models write -inf, some the dtype's lowest value."""


def limit(dtype: torch.dtype) -> float:
    """Rounding that differs in every product of a whole network, relative."""
    return {torch.float64: 1e-9, torch.float32: 1e-3}.get(dtype, 1e-1)


def compare(model: LoadedModel, reference: LoadedModel | nn.Module, inputs: Any) -> Iterator[Check]:
    """One check per site that both networks have, in the order of the model's."""
    other = reference if isinstance(reference, LoadedModel) else LoadedModel(reference)
    known = set(other.table.sites)
    shared = [site for site in model.table.sites if site in known and site.part is not Part.MODULE]
    if not shared:
        raise InterpError(f"{model.source} and {other.source} have no site in common that could be compared")
    ours, theirs = captured(model, inputs, shared), captured(other, inputs, shared)
    allowed = max(limit(model.dtype), limit(other.dtype))
    for site in shared:
        yield _difference(site, ours[site], theirs[site], allowed)


def _difference(site: Site, ours: Tensor, theirs: Tensor, allowed: float) -> Check:
    name = f"{site.part} equals the reference's"
    if ours.shape != theirs.shape:
        note = f"{tuple(ours.shape)} here, {tuple(theirs.shape)} in the reference"
        return Check(name=name, site=str(site), value=float("inf"), tolerance=allowed, passed=False, note=note)
    left, right = (torch.where(x < MASKED, 0, x.double()) for x in (ours, theirs.to(ours.device)))
    value = float((left - right).abs().max()) / (float(right.abs().max()) or 1.0)
    return Check(name=name, site=str(site), value=value, tolerance=allowed, passed=value <= allowed)


def unwrapped(bridge: nn.Module) -> nn.Module:
    """The Hugging Face model inside a TransformerBridge, built anew with its weights and its own modules.

    The bridge puts its components into the model it is given, so `bridge.original_model` is no independent reference.
    """
    original: Any = getattr(bridge, "original_model", None)
    if original is None:
        raise InterpError(f"{type(bridge).__name__} wraps no Hugging Face model; pass the reference yourself")
    fresh = cast(nn.Module, type(original)(original.config))
    state = {name.replace("_original_component.", ""): value for name, value in original.state_dict().items()}
    missing = fresh.load_state_dict(state, strict=False).missing_keys
    if missing:
        raise InterpError(f"the wrapped model lacks {missing[0]}; pass the reference yourself")
    return fresh.to(next(original.parameters())).eval()
