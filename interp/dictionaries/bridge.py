"""Dictionaries that read one site and write another, put in place of the part of the model between them.

    y_hat_j = write(j, [x_1, ..., x_j])     put at the j-th written site, from all sites read before it

A transcoder reads the input of an MLP and writes its output; a cross-layer transcoder reads the inputs of several MLPs,
and what it writes at one needs the inputs of that one and all before it, as they are in the edited run. An autoencoder
reads what it writes. Everything goes through `interp.edited`, so gradients flow to the dictionary and through it.
Tokens outside `keep` keep their own activation, as in `interp.dictionaries.splice`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.core.errors import InterpError
from interp.core.sites import Site
from interp.dictionaries.base import Dictionary
from interp.instrument.edits import Context, Edit

Write = Callable[[int, Sequence[Tensor]], Tensor]
"""What to put at the j-th written site, from the activations of the sites read so far, the last one last."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Bridge:
    """Which sites are read, which are written, and how. Reads and writes alternate: read 1, write 1, read 2, ..."""

    reads: tuple[Site, ...]
    writes: tuple[Site, ...]
    write: Write
    label: str = "splice"

    def __post_init__(self) -> None:
        if len(self.reads) != len(self.writes) or not self.reads:
            raise InterpError(f"{len(self.reads)} sites read and {len(self.writes)} written; give as many of each")

    def edits(self, keep: Bool[Tensor, "batch pos"]) -> list[Edit]:
        """Edits for one forward: sites read are copied and left as they are, sites written are replaced at `keep`."""
        seen: list[Tensor] = []

        def read(number: int) -> Callable[[Tensor, Context], Tensor]:
            def function(x: Tensor, _: Context) -> Tensor:
                if number == 0:
                    seen.clear()
                if len(seen) != number:
                    raise InterpError(f"{self.reads[number]} came out of order; list sites in the order of the forward")
                seen.append(x.float())
                return x

            return function

        def write(number: int) -> Callable[[Tensor, Context], Tensor]:
            def function(y: Tensor, _: Context) -> Tensor:
                if len(seen) != number + 1:
                    raise InterpError(
                        f"{self.writes[number]} is not computed right after {self.reads[number]}; pair each written "
                        "site with the one it is computed from"
                    )
                return self.write(number, tuple(seen)).to(y)

            return function

        found: list[Edit] = []
        for number, (source, target) in enumerate(zip(self.reads, self.writes, strict=True)):
            found.append(Edit(source, read(number), label="read"))
            found.append(Edit(target, write(number), at=keep, label=self.label))
        return found


def bridge(read: Site, write: Site, dictionary: Dictionary) -> Bridge:
    """One dictionary from one site to another; equal sites make it an autoencoder."""

    def function(_: int, xs: Sequence[Tensor]) -> Tensor:
        return dictionary.decode(dictionary.encode(xs[0]))

    return Bridge(reads=(read,), writes=(write,), write=function, label=f"splice {type(dictionary).__name__}")


def linear_map(
    x: Float[Tensor, "n d_in"], y: Float[Tensor, "n d_out"], *, ridge: float = 1e-2
) -> tuple[Float[Tensor, "d_in d_out"], Float[Tensor, "d_out"]]:
    """W and b of the ridge regression y = x W + b, in float64; `ridge` is relative to the mean variance of x."""
    if len(x) != len(y) or len(x) < 2:
        raise InterpError(f"a linear map needs at least 2 pairs, got {len(x)} inputs and {len(y)} targets")
    mean_x, mean_y = x.double().mean(0), y.double().mean(0)
    gram = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    cross = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, device=x.device)
    for part, target in zip(x.split(8192), y.split(8192), strict=True):
        centred = part.double() - mean_x
        gram.addmm_(centred.T, centred)
        cross.addmm_(centred.T, target.double() - mean_y)
    gram.diagonal().add_(ridge * gram.diagonal().mean().clamp_min(1e-300))
    weights = torch.cholesky_solve(cross, torch.linalg.cholesky(gram))
    return weights.to(x.dtype), (mean_y - mean_x @ weights).to(x.dtype)
