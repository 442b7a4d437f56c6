"""A gated MLP of your own: its sites in any network, in one call.

    class Expanded(nn.Module):                      # gate = (1 + 2a) sigmoid(x) - a, range (-a, 1 + a), a learnt
        ...
    interp.register_mlp(Expanded, gate_pre="w1", gate="act", up="w2", down="w3")
    model = interp.load(module)                     # register first: the table is made at load

A string names a child module: its output is meant, and for `down` its input. `name@input` is what goes into a child,
and `silu()` is what the first call of a torch function returns while your module runs, for values that no module
returns. A `Reach` says anything else: `Reach(path="w12", chunk=(0, 2))` for a fused projection, `Reach(path="",
side="op", op="mul", nth=1)` for the second call of a function.

In a network of a known family the sites of the layer are yours: `gate_pre.0` is where you say, with the family's other
sites around it. In any network they are `path:gate_pre`. The probe checks what is said here: gate * up == neurons, and,
in a family's layer, the products with W_gate, W_up and W_down where these are nn.Linear. Where your module multiplies
otherwise, give `product=False`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import nn

from interp.core.errors import InterpError, unknown
from interp.core.sites import Part
from interp.models.family import Block, Reach, Rule, Weight, register_block

Where = str | Reach

PRODUCT = Rule(
    text="gate * up == neurons",
    result=Part.NEURONS,
    inputs=(Part.GATE, Part.UP),
    function=lambda _module, gate, up: gate * up,
)
AXES = ("batch", "...", "d_mlp")
"""A plain network may have no positions."""


def register_mlp(
    cls: type[nn.Module],
    *,
    gate_pre: Where,
    gate: Where,
    up: Where | None = None,
    down: Where | None = None,
    product: bool = True,
    rules: tuple[Rule, ...] = (),
) -> Block:
    """Give the modules of a class the sites gate_pre, gate, up, neurons (the input of `down`) and mlp_out.

    rules: identities of your own that the probe is to check, e.g. the formula of a learnable activation.
    """
    if not (isinstance(cast(object, cls), type) and issubclass(cls, nn.Module)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InterpError(f"{cls!r} is no class of modules")
    said = {Part.GATE_PRE: gate_pre, Part.GATE: gate, Part.UP: up}
    parts = {part: _reach(where) for part, where in said.items() if where is not None}
    if down is not None:
        parts[Part.NEURONS] = _reach(f"{down}@input" if isinstance(down, str) and _is_child(down) else down)
    names = {"W_gate": gate_pre, "W_up": up, "W_down": down}
    block = Block(
        name=cls.__name__,
        classes=(cls.__name__,),
        when=lambda module: isinstance(module, cls) and _has_children(module, parts),
        parts={**parts, Part.MLP_OUT: Reach(path="", axes=("batch", "...", "d_model"))},
        rules=((PRODUCT,) if product and {Part.UP, Part.NEURONS} <= set(parts) else ()) + rules,
        weights={name: weight for name, where in names.items() if (weight := _weight(where)) is not None},
    )
    register_block(block)
    return block


def _has_children(module: nn.Module, parts: Mapping[Part, Reach]) -> bool:
    """Raises InterpError for a child that was named and is not there."""
    known = [path for path, _ in module.named_modules()]
    for part, reach in parts.items():
        if reach.path not in known:
            named = f"child of {type(module).__name__}, which register_mlp was given for {part}"
            raise unknown(named, reach.path, filter(None, known))
    return True


def _is_child(where: str) -> bool:
    return not where.endswith(("()", "@input"))


def _reach(where: Where) -> Reach:
    """`child`, `child@input` or `function()`."""
    if isinstance(where, Reach):
        return where
    if where.endswith("()"):
        return Reach(path="", side="op", op=where.removesuffix("()"), axes=AXES)
    if where.endswith("@input"):
        return Reach(path=where.removesuffix("@input"), side="input", axes=AXES)
    return Reach(path=where, axes=AXES)


def _weight(where: Where | None) -> Weight | None:
    if isinstance(where, Reach):
        plain = where.side in ("output", "input") and where.path and where.view is None
        return Weight(path=f"{where.path}.weight", chunk=where.chunk) if plain else None
    return Weight(path=f"{where}.weight") if where and _is_child(where) else None
