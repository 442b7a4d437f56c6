"""One thing that a probe checks, and how far two tensors are from each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from interp.core.errors import InterpError


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was checked."""

    name: str
    site: str
    value: float
    """Largest difference; relative to the largest magnitude where the tolerance is not 0."""
    tolerance: float
    passed: bool
    note: str = ""


def tolerance(dtype: torch.dtype) -> float:
    """Rounding of one matrix product in this dtype, relative: 1e-5 in float32, as the method cards ask."""
    return {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)


def check(name: str, site: str, value: float, limit: float, note: str = "") -> Check:
    return Check(name=name, site=site, value=value, tolerance=limit, passed=value <= limit, note=note)


def close(name: str, site: str, left: Tensor, right: Tensor, limit: float) -> Check:
    return check(name, site, distance(left, right), limit)


def distance(left: Tensor, right: Tensor) -> float:
    """Largest difference, relative to the largest magnitude on the right."""
    return float((left - right).abs().max()) / (float(right.abs().max()) or 1.0)


def tensors(output: Any) -> list[Tensor]:
    """The tensors of an output, in order; a packed sequence is its data."""
    leaves = pytree.tree_leaves(output, is_leaf=lambda item: isinstance(item, PackedSequence))
    values = [leaf.data if isinstance(leaf, PackedSequence) else leaf for leaf in leaves]
    return [value for value in values if isinstance(value, Tensor)]


def first_tensor(output: object) -> Tensor:
    """Logits, or whatever tensor the model returns first."""
    found = getattr(output, "logits", getattr(output, "last_hidden_state", output))
    there = tensors(found)
    if not there:
        raise InterpError(f"the model returns {type(output).__name__}; the probe needs a tensor in it")
    return there[0]
