"""Where nodes act, and what heads look at: columns and labels for the figure of a circuit (a helper).

A node's place is the position through which most of its weight in the circuit goes (sum of |score| over its edges
there). A head's label says which role it looks at from that place, if it gives it a quarter of its attention or more.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from interp.circuits.graph import Circuit
from interp.instrument.capture import capture
from interp.models.model import LoadedModel
from interp.tasks.base import PromptPairs

LEAST = 0.25
"""Share of attention from which a head is said to look at something."""
N_PAIRS = 8
"""Pairs whose patterns are averaged."""


def positions(circuit: Circuit, per_position: Float[Tensor, "pos source destination"]) -> dict[str, int]:
    """Each node of the circuit -> its position."""
    mass = (per_position.abs() * circuit.edges).sum(2)
    found = {name: int(mass[:, circuit.graph.source(name)].argmax()) for name in circuit.nodes() if name != "logits"}
    return found | {"logits": per_position.shape[0] - 1}


def columns(pairs: PromptPairs, places: dict[str, int]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Each node -> the name of its position, and the names from left to right."""
    names = {pos: pairs.label(pos) for pos in sorted(set(places.values()))}
    return {node: names[pos] for node, pos in places.items()}, tuple(names.values())


def looks_at(model: LoadedModel, pairs: PromptPairs, places: dict[str, int]) -> dict[str, str]:
    """Heads -> `to ROLE`, in the clean prompts."""
    heads = [(name, *map(int, name[1:].split(".h"))) for name in places if name.startswith("a")]
    if not heads or not pairs.roles:
        return {}
    some = pairs.take(range(min(N_PAIRS, len(pairs))))
    layers = sorted({layer for _, layer, _ in heads})
    with capture(model, [f"pattern.{layer}" for layer in layers]) as acts:
        model(some.clean)
    rows, found = torch.arange(len(some)), dict[str, str]()
    for name, layer, head in heads:
        seen = acts[f"pattern.{layer}"][:, head, places[name]].float().cpu()
        shares = {role: float(seen[rows, where].mean()) for role, where in some.roles.items()}
        shares.setdefault("start", float(seen[:, 0].mean()))
        role = max(shares, key=lambda each: shares[each])
        if shares[role] >= LEAST:
            found[name] = f"to {role}"
    return found
