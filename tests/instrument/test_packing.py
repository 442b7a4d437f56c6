"""Packing and padding lose no token, bucketing keeps padding small, and rows keep their numbers."""

from __future__ import annotations

from itertools import pairwise
from pydoc_data.topics import topics

import pytest
import torch

from interp.core.errors import InterpError
from interp.instrument.packing import bucketed, pack, pad, padding, trimmed
from interp.models.tiny import tiny_model

MODEL = tiny_model("llama", n_layers=1, n_ctx=4096)


def test_packing_is_the_documents_end_to_end() -> None:
    documents = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11]]
    record = pack(MODEL, documents, 4)
    assert record.ids.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert pack(MODEL, documents, 5, separator=257).ids.tolist() == [[1, 2, 3, 257, 4], [257, 5, 6, 7, 8]]
    assert pack(MODEL, documents, 5, separator=257).special.sum() == 2
    assert bool(record.mask.all()) and padding(record) == 0


@pytest.mark.parametrize(
    ("documents", "length", "separator", "says"),
    [
        ([], 4, None, "no documents"),
        ([[1]], 4, None, "do not fill one sequence of 4"),
        ([[1] * 9], 0, None, "length=0"),
        ([[1] * 9], 4, 999, "separator 999 is no token"),
    ],
)
def test_what_cannot_be_packed(documents: list[list[int]], length: int, separator: int | None, says: str) -> None:
    with pytest.raises(InterpError, match=says):
        pack(MODEL, documents, length, separator=separator)


def test_padding_keeps_each_document_a_row() -> None:
    record = pad(MODEL, [[1, 2, 3], [], [4], [5, 6, 7, 8, 9]], 4)
    assert [row[keep].tolist() for row, keep in zip(record.ids, record.mask, strict=True)] == [
        [1, 2, 3],
        [4],
        [5, 6, 7, 8],
    ]
    assert padding(record) == pytest.approx(4 / 12)
    with pytest.raises(InterpError, match="all documents are empty"):
        pad(MODEL, [[], []], 4)


def test_buckets_of_real_text_hold_every_token_once_and_little_padding() -> None:
    documents = [list(text.encode())[:2000] for text in topics.values()]
    record = pad(MODEL, documents, 2000)
    batches = bucketed(record, 8)
    assert padding(record) > 0.3  # as a rectangle
    assert batches.padding < 0.1  # in buckets: the bound
    rows: list[int] = []
    run = 0
    for number in range(batches.n_batches):
        batch = batches.batch(number)
        run += batch.record.ids.numel()
        for row, ids, keep in zip(batch.rows.tolist(), batch.record.ids, batch.record.mask, strict=True):
            rows.append(row)
            assert ids[keep].tolist() == record.ids[row][record.mask[row]].tolist()
    assert sorted(rows) == list(range(len(record)))
    assert batches.padding == pytest.approx(1 - record.n_tokens / run)
    lengths = [batches.batch(i).record.ids.shape[1] for i in range(batches.n_batches)]
    assert lengths == sorted(lengths, reverse=True)
    assert batches.hash == record.hash and batches.n_tokens == record.n_tokens


@pytest.mark.parametrize("lengths", [[1], [9, 9, 9], [40, 1, 1, 1], [30, 28, 3, 29, 27, 1], list(range(1, 40))])
@pytest.mark.parametrize("bound", [0.0, 0.1, 1.0])
def test_no_batch_has_more_padding_than_the_bound(lengths: list[int], bound: float) -> None:
    record = pad(MODEL, [[7] * n for n in lengths], 64)
    batches = bucketed(record, 3, max_padding=bound)
    parts = [batches.batch(number) for number in range(batches.n_batches)]
    assert all(len(part.rows) <= 3 and padding(part.record) <= bound for part in parts)
    assert sorted(row for part in parts for row in part.rows.tolist()) == list(range(len(lengths)))
    assert batches.padding == pytest.approx(1 - sum(lengths) / sum(part.record.ids.numel() for part in parts))
    for part, later in pairwise(parts):  # no batch ends without a reason
        joined = torch.cat([part.rows, later.rows[:1]]).tolist()
        more = 1 - sum(lengths[row] for row in joined) / (len(joined) * lengths[joined[0]])
        assert len(part.rows) == 3 or more > bound
    if bound == 1.0:
        assert len(parts) == -(-len(lengths) // 3)


def test_activations_do_not_depend_on_the_bucket() -> None:
    record = pad(MODEL, [list(b"one two three"), list(b"a"), list(b"four five"), list(b"bc")], 16)
    whole = MODEL(record)
    for number in range(2):
        batch = bucketed(record, 2, max_padding=0.5).batch(number)
        logits = MODEL(batch.record)
        for i, row in enumerate(batch.rows.tolist()):
            n = int(record.lengths[row])
            assert torch.allclose(logits[i, :n], whole[row, :n], atol=1e-4)


def test_trimming_leaves_real_columns() -> None:
    record = pad(MODEL, [[1, 2], [3]], 8)
    assert trimmed(record).ids.shape == (2, 2) and trimmed(record).strings[1] == ("\x03", "")
