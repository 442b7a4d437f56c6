"""NaN and infinity: at which site do they first appear?

Looking costs one pass over each value, so it is done where half precision makes it likely, and elsewhere on request.
The smallest and largest value of a firing (both NaN if any value is) are kept and read at the end: a GPU is not waited
for in between.
"""

from __future__ import annotations

import warnings
from typing import Literal, cast

import torch
from torch import Tensor

from interp.core.errors import InterpError

Finite = Literal["warn", "raise", "off"]


class NonFiniteWarning(UserWarning):
    """A captured value is NaN or infinite."""


def how_to_look(mode: Finite | None, model: torch.dtype, kept: torch.dtype | None) -> Finite:
    """What was asked for; else a warning where half precision computes the values or keeps them."""
    if kept is not None and not (isinstance(cast(object, kept), torch.dtype) and kept.is_floating_point):
        raise InterpError(f"dtype={kept!r} cannot hold activations; give a floating dtype, e.g. torch.bfloat16")
    return mode or ("warn" if {model, kept} & {torch.float16, torch.bfloat16} else "off")


class Extremes:
    """Smallest and largest values of what fired, in order."""

    def __init__(self, mode: Finite) -> None:
        self.mode: Finite = mode
        self.seen: list[tuple[str, torch.dtype, Tensor]] = []

    def look(self, name: str, value: Tensor) -> None:
        if self.mode != "off" and value.is_floating_point() and value.numel():
            self.seen.append((name, value.dtype, torch.stack(value.detach().aminmax())))

    def report(self) -> dict[str, int] | None:
        """How often each site fired with a value that is not finite; says so, or refuses. `None` if not looked at."""
        if self.mode == "off":
            return None
        bad = [(name, dtype) for name, dtype, ends in self.seen if not bool(torch.isfinite(ends).all())]
        found: dict[str, int] = {}
        for name, _ in bad:
            found[name] = found.get(name, 0) + 1
        if found:
            text = (
                f"{bad[0][0]} is the first of {len(found)} sites with NaN or infinity ({bad[0][1]}); look at the input "
                "and the weights before it, or load the model in float32"
            )
            if self.mode == "raise":
                raise InterpError(text)
            warnings.warn(text, NonFiniteWarning, stacklevel=5)
        return found
