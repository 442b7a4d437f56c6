"""Sparse codes of a whole corpus on disk, in the order of its tokens: written once, read in blocks as often as wanted.

Plain little-endian arrays in one folder: per real token its id, whether it counts and how many latents fire there; per
firing its latent and its value. In memory are only two offsets per row. 8 bytes per firing, 6 per token.
A folder is scratch space of one run: it is not checked for damage and belongs to no format.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Bool, Float, Int

TYPES = {"id": "<i4", "kept": "|b1", "count": "<u2", "latent": "<i4", "value": "<f4"}
PER_TOKEN = ("id", "kept", "count")
MAX_PER_TOKEN = 65_535
"""Latents that may fire at one token."""


class CodesWriter:
    """Appends rows; `with CodesWriter(folder) as writer: ...`, then `writer.codes()`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, BinaryIO] = {}
        self._rows: list[int] = []
        self._tokens, self._firings = [0], [0]

    def __enter__(self) -> CodesWriter:
        self._files = {name: (self.folder / name).open("wb") for name in TYPES}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for file in self._files.values():
            file.close()

    def append(
        self,
        rows: Int[np.ndarray, " row"],
        lengths: Int[np.ndarray, " row"],
        ids: Int[np.ndarray, " token"],
        kept: Bool[np.ndarray, " token"],
        counts: Int[np.ndarray, " token"],
        latents: Int[np.ndarray, " firing"],
        values: Float[np.ndarray, " firing"],
    ) -> None:
        """Whole rows: their numbers and lengths, then their tokens, then the firings of these tokens in order."""
        given = {"id": ids, "kept": kept, "count": counts, "latent": latents, "value": values}
        for name, array in given.items():
            self._files[name].write(np.ascontiguousarray(array, dtype=TYPES[name]).tobytes())
        token_ends = np.cumsum(lengths)
        firing_ends = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])[token_ends]
        self._rows += rows.tolist()
        self._tokens += (self._tokens[-1] + token_ends).tolist()
        self._firings += (self._firings[-1] + firing_ends).tolist()

    def codes(self) -> Codes:
        """What was written; the writer must be closed."""
        sizes = {name: self._tokens[-1] if name in PER_TOKEN else self._firings[-1] for name in TYPES}
        arrays = {
            name: np.memmap(self.folder / name, dtype=TYPES[name], mode="r") if size else np.zeros(0, TYPES[name])
            for name, size in sizes.items()
        }
        return Codes(
            rows=np.array(self._rows, dtype=np.int64),
            token_start=np.array(self._tokens, dtype=np.int64),
            firing_start=np.array(self._firings, dtype=np.int64),
            arrays=arrays,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """Some consecutive rows: their tokens, and their firings with the place of each one's token in the block."""

    rows: Int[np.ndarray, " row"]
    """Number of each row in the whole input."""
    starts: Int[np.ndarray, " rows_and_end"]
    """Place of each row's first token in the block, and the number of tokens."""
    id: Int[np.ndarray, " token"]
    kept: Bool[np.ndarray, " token"]
    token: Int[np.ndarray, " firing"]
    latent: Int[np.ndarray, " firing"]
    value: Float[np.ndarray, " firing"]

    @property
    def row_of(self) -> Int[np.ndarray, " token"]:
        """Place of each token's row in the block."""
        return np.repeat(np.arange(len(self.rows)), np.diff(self.starts))

    @property
    def pos(self) -> Int[np.ndarray, " token"]:
        """Position of each token in its row, padding not counted."""
        return np.arange(len(self.id)) - self.starts[self.row_of]

    @property
    def following(self) -> Int[np.ndarray, " token"]:
        """Id of the next token of the row; -1 at its end."""
        after = np.full(len(self.id), -1, dtype=np.int64)
        after[:-1] = self.id[1:]
        after[self.starts[1:] - 1] = -1
        return after

    def windows(self, tokens: Int[np.ndarray, " n"], width: int) -> Int[np.ndarray, "n window"]:
        """Ids up to `width` tokens to both sides of some tokens; -1 beyond the row."""
        offsets = np.arange(-width, width + 1)
        places = tokens[:, None] + offsets
        row = self.row_of[tokens][:, None]
        inside = (places >= self.starts[row]) & (places < self.starts[row + 1])
        return np.where(inside, self.id[np.clip(places, 0, len(self.id) - 1)], -1).astype(np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Codes:
    """Codes on disk; rows are counted from 0 in the order of writing, `rows` has their numbers in the input."""

    rows: Int[np.ndarray, " row"]
    token_start: Int[np.ndarray, " rows_and_end"]
    firing_start: Int[np.ndarray, " rows_and_end"]
    arrays: dict[str, Any]
    """Name -> memory-mapped array."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def n_tokens(self) -> int:
        return int(self.token_start[-1])

    def block(self, first: int, end: int) -> Block:
        """Rows `first` to `end - 1`."""
        tokens = slice(int(self.token_start[first]), int(self.token_start[end]))
        firings = slice(int(self.firing_start[first]), int(self.firing_start[end]))
        part = {name: np.array(self.arrays[name][tokens if name in PER_TOKEN else firings]) for name in TYPES}
        return Block(
            rows=self.rows[first:end],
            starts=self.token_start[first : end + 1] - self.token_start[first],
            id=part["id"],
            kept=part["kept"],
            token=np.repeat(np.arange(len(part["id"])), part["count"]),
            latent=part["latent"],
            value=part["value"],
        )

    def blocks(self, n_tokens: int) -> Iterator[Block]:
        """All rows in order, in blocks of about so many tokens and at least one row."""
        first = 0
        while first < len(self):
            limit = int(self.token_start[first]) + n_tokens
            end = int(np.searchsorted(self.token_start, limit, side="right")) - 1
            end = min(max(end, first + 1), len(self))
            yield self.block(first, end)
            first = end
