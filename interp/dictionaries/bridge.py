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

from jaxtyping import Bool
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
