"""Edits of a stream that a skip connection has already saved.

A block computes `output = stream + sublayer(norm(stream))`. The site of the stream between sublayers is the input of
that norm, so an edit there reaches the sublayer but not the sum. A `Carry` makes the sum again, as the block does:
edited stream + what the sublayer added. No difference is taken, so nothing is rounded beside huge values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(eq=False)
class Carry:
    """What is known of one block in one forward."""

    users: int = 0
    """Edits of its stream that are open."""
    stream: Tensor | None = None
    """The stream as edited."""
    added: Tensor | None = None
    """What the sublayer adds to it."""
    stop: Callable[[], None] = lambda: None
    """Takes its reader and writer away."""

    def keep(self, _view: Tensor, raw: Tensor) -> None:
        """A reader of what the sublayer adds."""
        self.added = raw

    def join(self, output: Tensor) -> Tensor:
        """A writer of the block's output."""
        stream, self.stream = self.stream, None
        return output if stream is None or self.added is None else stream + self.added

    def forget(self) -> None:
        """A new forward begins."""
        self.stream = self.added = None
