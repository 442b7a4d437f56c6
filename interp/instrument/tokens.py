"""Token records: what exactly the model reads, for capture, training, evaluation and reports alike.

A record holds the ids, which positions are real (`mask`), which are special tokens, where each token sits in its text,
and the text of each token. Nothing is prepended silently: special tokens are added only with `add_special=True`, and a
record says so where that looks wrong (a start token twice, or none for a model trained with one).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.core.errors import InterpError
from interp.core.hash import hash_tensors
from interp.instrument.capture import capture
from interp.models.model import LoadedModel

Pad = Literal["left", "right"]
SINK_ROWS = 16
"""Rows per forward while looking for sinks."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenRecord:
    """Tokens of a batch of texts."""

    ids: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    """True where there is a real token, False on padding."""
    special: Bool[Tensor, "batch pos"]
    """True on special tokens (start, end, ...) that are not padding."""
    strings: tuple[tuple[str, ...], ...]
    """The text of each token; padding is empty."""
    texts: tuple[str, ...] | None = None
    spans: Int[Tensor, "batch pos 2"] | None = None
    """First and last-plus-one character of each token in its text; -1 on padding and added tokens."""
    notes: tuple[str, ...] = ()
    """What a reader should know: a doubled start token, a missing one, truncation."""

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.numel() == 0:
            raise InterpError(f"a token record needs ids of shape (batch, pos), not empty; got {tuple(self.ids.shape)}")
        if self.mask.shape != self.ids.shape or self.special.shape != self.ids.shape:
            raise InterpError("ids, mask and special of a token record must have one shape")
        if not bool(self.mask.any(dim=1).all()):
            raise InterpError(f"row {int(self.mask.any(dim=1).logical_not().nonzero()[0])} holds only padding")

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def n_tokens(self) -> int:
        """Real tokens, padding not counted."""
        return int(self.mask.sum())

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        return self.mask.sum(dim=1)

    @cached_property
    def hash(self) -> str:
        """Content hash of ids and mask: what a manifest writes down."""
        return hash_tensors({"ids": self.ids, "mask": self.mask})

    @property
    def first(self) -> Int[Tensor, " batch"]:
        """Position of each row's first real token."""
        return self.mask.int().argmax(dim=1)

    @property
    def last(self) -> Int[Tensor, " batch"]:
        """Position of each row's last real token."""
        return self.ids.shape[1] - 1 - self.mask.flip(1).int().argmax(dim=1)

    def str_tokens(self, row: int = 0) -> list[str]:
        """The tokens of one row as text, padding left out."""
        self._check_row(row)
        return [text for text, real in zip(self.strings[row], self.mask[row].tolist(), strict=True) if real]

    def find(self, row: int, text: str) -> list[int]:
        """Positions of the tokens that overlap the first occurrence of `text` in a row's text."""
        self._check_row(row)
        if self.texts is None or self.spans is None:
            raise InterpError("this record has no texts with character spans; make it with tokenize(model, texts)")
        start = self.texts[row].find(text)
        if start < 0 or not text:
            raise InterpError(f"{text!r} does not occur in row {row}: {self.texts[row]!r}")
        begin, end = self.spans[row].unbind(-1)
        return ((begin < start + len(text)) & (end > start)).nonzero()[:, 0].tolist()

    def sinks(self, model: LoadedModel, ratio: float = 10.0) -> Bool[Tensor, "batch pos"]:
        """Attention-sink candidates; see `sink_candidates`."""
        return sink_candidates(model, self, ratio=ratio)

    def rows(self, index: slice | Sequence[int]) -> TokenRecord:
        """Some of the rows, in the order asked for."""
        chosen = list(range(len(self)))[index] if isinstance(index, slice) else list(index)
        for row in chosen:
            self._check_row(row)
        return replace(
            self,
            ids=self.ids[chosen],
            mask=self.mask[chosen],
            special=self.special[chosen],
            strings=tuple(self.strings[row] for row in chosen),
            texts=None if self.texts is None else tuple(self.texts[row] for row in chosen),
            spans=None if self.spans is None else self.spans[chosen],
        )

    def _check_row(self, row: int) -> None:
        if not -len(self) <= row < len(self):
            raise InterpError(f"no row {row}: the record has rows 0 to {len(self) - 1}")

    def __repr__(self) -> str:
        padding = self.ids.numel() - self.n_tokens
        notes = "".join(f"; {note}" for note in self.notes)
        size = f"{len(self)} x {self.ids.shape[1]}"
        return f"TokenRecord({size}, {padding} padding, {int(self.special.sum())} special{notes})"


def tokenize(
    model: LoadedModel, texts: str | Sequence[str], *, add_special: bool = False, pad: Pad | None = None
) -> TokenRecord:
    """Texts to a record. Unequal lengths need `pad`: `right` for scoring, `left` for generation.

    add_special: let the tokenizer add what it was made to add (for many models a start token).
    """
    tokenizer, listed = _tokenizer(model), [texts] if isinstance(texts, str) else list(texts)
    if not listed:
        raise InterpError("there are no texts to tokenize")
    with_spans = bool(getattr(tokenizer, "is_fast", False))
    rows: list[list[int]] = []
    spans: list[list[tuple[int, int]]] = []
    for number, text in enumerate(listed):
        out = tokenizer(text, add_special_tokens=add_special, return_offsets_mapping=with_spans)
        if not text or not out["input_ids"]:
            raise InterpError(f"text {number} is empty: {text!r}; leave it out")
        rows.append(list(out["input_ids"]))
        spans.append([tuple(pair) for pair in out["offset_mapping"]] if with_spans else [])
    lengths = [len(row) for row in rows]
    if pad is None and len(set(lengths)) > 1:
        shown = f"{min(lengths)} to {max(lengths)} tokens"
        raise InterpError(f"the texts have unequal lengths ({shown}); pass pad='right', or 'left' for generation")
    if pad not in (None, "left", "right"):
        raise InterpError(f"pad={pad!r}; choose 'left', 'right' or None")
    _check_length(model, max(lengths))
    ids, mask = _padded(rows, _pad_id(tokenizer), pad)
    placed = torch.full((*ids.shape, 2), -1)
    if with_spans:
        placed[mask] = torch.tensor([pair if pair[0] < pair[1] else (-1, -1) for row in spans for pair in row])
    record = _record(tokenizer, ids, mask, add_special=add_special)
    return replace(record, texts=tuple(listed), spans=placed if with_spans else None)


def adds_start(model: LoadedModel) -> bool:
    """Whether the tokenizer, left to itself, puts one start token before a text and nothing after it."""
    return _adds_start(_tokenizer(model))


def from_ids(
    model: LoadedModel,
    ids: Int[Tensor, "batch pos"] | Sequence[Sequence[int]],
    mask: Bool[Tensor, "batch pos"] | None = None,
) -> TokenRecord:
    """Ids to a record, with each token's text where the model has a tokenizer."""
    tensor = ids if isinstance(ids, Tensor) else torch.tensor([list(row) for row in ids])
    if tensor.ndim != 2 or tensor.is_floating_point():
        raise InterpError(f"ids must be whole numbers of shape (batch, pos), got {tensor.dtype} {tuple(tensor.shape)}")
    tensor = tensor.detach().cpu().long()
    d_vocab = model.dims.d_vocab
    if tensor.numel() and (int(tensor.min()) < 0 or (d_vocab is not None and int(tensor.max()) >= d_vocab)):
        low, high = int(tensor.min()), int(tensor.max())
        raise InterpError(f"token ids must be from 0 to {(d_vocab or 0) - 1}, got {low} to {high}")
    _check_length(model, tensor.shape[1])
    real = torch.ones_like(tensor, dtype=torch.bool) if mask is None else mask.cpu().bool()
    return _record(model.tokenizer, tensor, real)


def from_rows(model: LoadedModel, rows: Sequence[Sequence[int]], *, pad: Pad = "right") -> TokenRecord:
    """Rows of ids of unequal lengths to a record, padded."""
    listed = [list(row) for row in rows]
    if not listed or not all(listed):
        raise InterpError("there are no rows of ids" if not listed else "a row holds no ids; leave it out")
    ids, mask = _padded(listed, _pad_id(model.tokenizer), pad)
    return from_ids(model, ids, mask)


def sink_candidates(
    model: LoadedModel, record: TokenRecord, *, ratio: float = 10.0, layer: int | None = None
) -> Bool[Tensor, "batch pos"]:
    """Tokens whose residual norm is above `ratio` times the median, in the stream after a middle layer.

    Such tokens hold massive activations and draw attention as sinks (Sun et al. 2024, arxiv.org/abs/2402.17762);
    steering them, or averaging over them, mostly breaks the model.
    """
    layer = model.n_layers // 2 if layer is None else layer
    norms = residual_norms(model, record, [layer])[0]
    return (norms > ratio * norms[record.mask].median()) & record.mask


def residual_norms(model: LoadedModel, record: TokenRecord, layers: Sequence[int]) -> Tensor:
    """Norm of the stream after each of some blocks: (layer, batch, pos), float32 on the cpu."""
    names = [f"resid_post.{layer}" for layer in layers]
    parts: list[Tensor] = []
    for start in range(0, len(record), SINK_ROWS):
        with capture(model, names) as acts:
            model(record.rows(slice(start, start + SINK_ROWS)))
        parts.append(torch.stack([acts[name].float().norm(dim=-1).cpu() for name in names]))
    return torch.cat(parts, dim=1)


def _tokenizer(model: LoadedModel) -> Any:
    if model.tokenizer is None:
        raise InterpError(f"{model.source} has no tokenizer; load it with load(..., tokenizer=...), or use from_ids")
    return model.tokenizer


def _check_length(model: LoadedModel, length: int) -> None:
    n_ctx = model.dims.n_ctx
    if n_ctx is not None and length > n_ctx:
        raise InterpError(f"{length} tokens are more than the model's context of {n_ctx}; cut the text")


def _pad_id(tokenizer: Any) -> int:
    found = (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None))
    return next((int(i) for i in found if i is not None), 0)


def _padded(rows: list[list[int]], pad_id: int, side: Pad | None) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for number, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[number, where], mask[number, where] = torch.tensor(row), True
    return ids, mask


def _record(tokenizer: Any, ids: Tensor, mask: Tensor, *, add_special: bool = False) -> TokenRecord:
    """A record without texts: special tokens, strings and notes come from the ids."""
    known = torch.tensor(sorted(getattr(tokenizer, "all_special_ids", None) or []), dtype=torch.long)
    strings = {i: _string(tokenizer, i) for i in ids[mask].unique().tolist()} if tokenizer is not None else {}
    return TokenRecord(
        ids=ids,
        mask=mask,
        special=torch.isin(ids, known) & mask,
        strings=tuple(
            tuple(strings.get(i, str(i)) if real else "" for i, real in zip(row, keep, strict=True))
            for row, keep in zip(ids.tolist(), mask.tolist(), strict=True)
        ),
        notes=_start_notes(tokenizer, ids, mask, add_special),
    )


def _string(tokenizer: Any, token: int) -> str:
    """Text of one token, with the leading space that some tokenizers drop when they decode a token alone."""
    piece = tokenizer.convert_ids_to_tokens(token)
    text = tokenizer.decode([token], skip_special_tokens=False)
    return f" {text}" if isinstance(piece, str) and piece.startswith("▁") and not text.startswith(" ") else text


def _adds_start(tokenizer: Any) -> bool:
    bos = getattr(tokenizer, "bos_token_id", None)
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    return bos is not None and list(tokenizer("a")["input_ids"]) == [bos, *bare]


def _start_notes(tokenizer: Any, ids: Tensor, mask: Tensor, add_special: bool) -> tuple[str, ...]:
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        return ()
    rows = [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
    if any(row[:2] == [bos, bos] for row in rows):
        return ("the start token comes twice: it was in the text and was added again",)
    if _adds_start(tokenizer) and not add_special and not all(row[0] == bos for row in rows):
        return ("no start token, though this model's tokenizer would add one; add_special=True adds it",)
    return ()
