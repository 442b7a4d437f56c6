"""From documents to sequences: packed into equal lengths, or padded, in batches of similar length.

`pack` joins all documents, a separator token between them if one is named, and cuts the stream into `length` tokens:
no padding, but a sequence may begin in the middle of a document and hold the end of another. `pad` keeps each document
a sequence of its own, cut at `length`, padded on the right. Nothing is prepended silently in either.

`bucketed` orders padded sequences by length and ends a batch before its padding exceeds a bound (10 % of the batch), so
that of the whole stays below it too; rows keep their numbers, and the cut depends on the lengths alone.
`padding` says what share of positions is padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Int
from torch import Tensor

from interp.core.errors import InterpError
from interp.instrument.stream import Batch
from interp.instrument.tokens import TokenRecord, from_ids, from_rows
from interp.models.model import LoadedModel


def pack(
    model: LoadedModel, documents: Sequence[Sequence[int]], length: int, *, separator: int | None = None
) -> TokenRecord:
    """Token ids of documents as sequences of `length`; what is left at the end and fills none is left out."""
    _check(documents, length)
    if separator is not None and not 0 <= separator < (model.dims.d_vocab or separator + 1):
        raise InterpError(f"separator {separator} is no token: ids run from 0 to {(model.dims.d_vocab or 1) - 1}")
    stream: list[int] = []
    for number, document in enumerate(documents):
        if number and separator is not None:
            stream.append(separator)
        stream.extend(document)
    n_rows = len(stream) // length
    if not n_rows:
        raise InterpError(f"{len(stream)} tokens do not fill one sequence of {length}; lower the length, or pad")
    ids = torch.tensor(stream[: n_rows * length]).view(n_rows, length)
    return replace(from_ids(model, ids), notes=())  # a cut text has no start token, and is not meant to


def pad(model: LoadedModel, documents: Sequence[Sequence[int]], length: int) -> TokenRecord:
    """Token ids of documents, one sequence each, cut at `length` and padded on the right; empty ones are left out."""
    _check(documents, length)
    kept = [list(document[:length]) for document in documents if len(document)]
    if not kept:
        raise InterpError("all documents are empty")
    return from_rows(model, kept)


def _check(documents: Sequence[Sequence[int]], length: int) -> None:
    if length < 1:
        raise InterpError(f"length={length} must be at least 1")
    if not len(documents):
        raise InterpError("there are no documents")


@dataclass(frozen=True)
class BucketedBatches:
    """A padded record in batches of similar length; the longest first, so that memory shows at once."""

    record: TokenRecord
    order: Int[Tensor, " n"]
    starts: tuple[int, ...]
    """Where in the order each batch begins, and the end."""
    cut: str

    @property
    def hash(self) -> str:
        return self.record.hash

    @property
    def n_batches(self) -> int:
        return len(self.starts) - 1

    @property
    def n_tokens(self) -> int:
        return self.record.n_tokens

    def batch(self, number: int) -> Batch:
        if not 0 <= number < self.n_batches:
            raise InterpError(f"no batch {number}: there are batches 0 to {self.n_batches - 1}")
        rows = self.order[self.starts[number] : self.starts[number + 1]]
        return Batch(number=number, rows=rows, record=trimmed(self.record.rows(rows.tolist())))

    @property
    def padding(self) -> float:
        """Share of the positions that are run which are padding."""
        lengths = self.record.lengths[self.order]
        run = sum(int(lengths[a]) * (b - a) for a, b in pairwise(self.starts))
        return 1 - self.record.n_tokens / run


def bucketed(record: TokenRecord, rows_per_forward: int = 8, *, max_padding: float = 0.1) -> BucketedBatches:
    """Batches of similar length, the longest first; rows of equal length stay in their order.

    A batch has at most `rows_per_forward` rows, and fewer where more would make padding exceed `max_padding` of it.
    """
    if rows_per_forward < 1 or not 0 <= max_padding <= 1:
        raise InterpError(f"rows_per_forward={rows_per_forward} must be at least 1, max_padding={max_padding} in 0..1")
    order = torch.argsort(-record.lengths, stable=True)
    starts, longest, real = [0], 0, 0
    for at, length in enumerate(record.lengths[order].tolist()):
        n = at - starts[-1] + 1
        if at and (n > rows_per_forward or n * longest - real - length > max_padding * n * longest):
            starts.append(at)
            n = 1
        longest, real = (length, length) if n == 1 else (longest, real + length)
    cut = f"at most {rows_per_forward} rows per forward, sorted by length, at most {max_padding:g} padding"
    return BucketedBatches(record, order, (*starts, len(order)), cut)


def padding(record: TokenRecord) -> float:
    """Share of a record's positions that are padding."""
    return 1 - record.n_tokens / record.ids.numel()


def trimmed(record: TokenRecord) -> TokenRecord:
    """The record without columns that hold nothing but padding."""
    columns = record.mask.any(dim=0).nonzero()[:, 0]
    keep = slice(int(columns[0]), int(columns[-1]) + 1)
    return replace(
        record,
        ids=record.ids[:, keep],
        mask=record.mask[:, keep],
        special=record.special[:, keep],
        strings=tuple(row[keep] for row in record.strings),
        spans=None if record.spans is None else record.spans[:, keep],
    )
