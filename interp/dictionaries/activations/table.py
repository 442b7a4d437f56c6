"""Activations by name: what a saved dictionary needs to be rebuilt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from interp.core.errors import ArtefactError, unknown
from interp.dictionaries.activations.base import Activation
from interp.dictionaries.activations.batch_topk import BatchTopK
from interp.dictionaries.activations.gated import Gated
from interp.dictionaries.activations.gradient_topk import GradientTopK
from interp.dictionaries.activations.group_max import GroupMax
from interp.dictionaries.activations.jump_relu import JumpReLU
from interp.dictionaries.activations.relu import ReLU
from interp.dictionaries.activations.top_afa import TopAFA
from interp.dictionaries.activations.topk import TopK

ACTIVATIONS: Mapping[str, Callable[..., Activation]] = {
    "relu": lambda d_dict: ReLU(),
    "topk": lambda d_dict, **settings: TopK(**settings),
    "batch_topk": lambda d_dict, **settings: BatchTopK(**settings),
    "group_max": lambda d_dict, **settings: GroupMax(**settings),
    "top_afa": lambda d_dict: TopAFA(),
    "gradient_topk": lambda d_dict, **settings: GradientTopK(**settings),
    "jump_relu": lambda d_dict, **settings: JumpReLU(d_dict, **settings),
    "gated": lambda d_dict: Gated(d_dict),
}
"""kind -> (d_dict, **settings) -> activation."""


def rebuild(kind: str, d_dict: int, settings: Mapping[str, Any]) -> Activation:
    """An activation from what `settings()` said; its tensors are loaded afterwards."""
    if kind not in ACTIVATIONS:
        raise unknown("activation", kind, ACTIVATIONS)
    try:
        return ACTIVATIONS[kind](d_dict, **settings)
    except TypeError as error:
        raise ArtefactError(f"settings {dict(settings)} do not fit the activation {kind!r}: {error}") from error
