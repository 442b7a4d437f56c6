"""Batches: the numbered parts of an input, in the order in which a capture runs them.

A capture asks for batch `number` by random access, so that each of several processes takes its own and a resumed one
skips what is done. Batch `number` must be the same whenever and wherever it is asked for: the bytes of a store follow
from it. `hash` names the rows and their numbers, not the cut into batches; `cut` names the cut.

    batches = RecordBatches(tokenize(model, texts, pad="right"), rows_per_forward=8)
    model(batches.batch(0).feed)

Trap: the last bits of an activation depend on which rows share a forward, so another cut gives another store of equal
content, not of equal bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.core.errors import InterpError
from interp.instrument.tokens import TokenRecord


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """What one forward pass reads: tokens (`record`), or anything else as a tensor (`inputs`)."""

    number: int
    rows: Int[Tensor, " batch"]
    """Number of each row in the whole input; no two batches share one."""
    record: TokenRecord | None = None
    inputs: Tensor | None = None
    """Images, signals, ...: handed to the module as they are."""
    mask: Bool[Tensor, "batch pos"] | None = None
    """With `inputs`: True where a position is real; None where all are, or where there are no positions."""

    def __post_init__(self) -> None:
        if (self.record is None) == (self.inputs is None):
            raise InterpError("a batch holds either a token record or other inputs")
        if self.record is not None and self.mask is not None:
            raise InterpError("a token record brings its own mask")
        if len(self.feed) != len(self.rows):
            raise InterpError(f"batch {self.number} has {len(self.feed)} inputs and {len(self.rows)} row numbers")

    @property
    def feed(self) -> Any:
        """What the model is called with."""
        return self.record if self.record is not None else self.inputs

    @property
    def real(self) -> Bool[Tensor, "batch pos"] | None:
        """Which positions are real; None where that is not said."""
        return self.mask if self.record is None else self.record.mask

    @property
    def n_tokens(self) -> int:
        """Real positions; the number of rows where positions are not told."""
        return len(self.rows) if self.real is None else int(self.real.sum())


@runtime_checkable
class Batches(Protocol):
    """An input of any size, cut into batches that can be asked for in any order."""

    @property
    def hash(self) -> str:
        """Content hash of all rows and their numbers; how they are cut into batches does not enter."""
        ...

    @property
    def cut(self) -> str:
        """How the rows are cut into batches, in words: equal `hash` and `cut` mean equal batches."""
        ...

    @property
    def n_batches(self) -> int: ...

    @property
    def n_tokens(self) -> int | None:
        """Real positions of the whole input; None where only reading it would tell."""
        ...

    def batch(self, number: int) -> Batch: ...


class RecordBatches:
    """A token record, `rows_per_forward` rows at a time, in order."""

    def __init__(self, record: TokenRecord, rows_per_forward: int = 8) -> None:
        if rows_per_forward < 1:
            raise InterpError(f"rows_per_forward={rows_per_forward} must be at least 1")
        self.record, self.rows_per_forward = record, rows_per_forward

    @property
    def hash(self) -> str:
        return self.record.hash

    @property
    def cut(self) -> str:
        return f"{self.rows_per_forward} rows per forward"

    @property
    def n_batches(self) -> int:
        return -(-len(self.record) // self.rows_per_forward)

    @property
    def n_tokens(self) -> int:
        return self.record.n_tokens

    def batch(self, number: int) -> Batch:
        if not 0 <= number < self.n_batches:
            raise InterpError(f"no batch {number}: there are batches 0 to {self.n_batches - 1}")
        start = number * self.rows_per_forward
        part = self.record.rows(slice(start, start + self.rows_per_forward))
        return Batch(number=number, rows=torch.arange(start, start + len(part)), record=part)
