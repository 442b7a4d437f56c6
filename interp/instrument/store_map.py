"""One column of all shards as one array: the shards of a local store, mapped behind each other in memory.

A gather over many shards costs a copy per shard and one more to put the rows in order; over one array it is a single
`index_select`. So we reserve a range of addresses and map each shard's file into it, such that its rows fall on the
grid of the first one's: address = base (mod bytes of a row). Between two shards lie a few rows that are never touched.
That grid can be met because pages are 4,096 bytes and a column starts at a multiple of the power of two in its row's
bytes (`shards.row_alignment`): with r bytes to a row, some multiple of 4,096 is what is needed modulo r.
Only on POSIX systems; elsewhere `MappedColumn.open` returns None and the reader gathers shard by shard.
Pages are read when touched and may be dropped by the kernel at any time: mapped memory is not used memory.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

PROT_NONE, PROT_READ, PROT_WRITE = 0, 1, 2
MAP_PRIVATE, MAP_FIXED = 2, 0x10
MAP_ANONYMOUS = 0x1000 if sys.platform == "darwin" else 0x20
MAP_NORESERVE = 0x40 if sys.platform == "darwin" else 0x4000
PAGE = 4096
FAILED = ctypes.c_void_p(-1).value


class MappedColumn:
    """`rows` holds every shard's rows; shard i begins at row `first[i]`."""

    def __init__(self, rows: Tensor, first: Int[Tensor, " shards"], sizes: Sequence[int]) -> None:
        self.rows, self.first, self.sizes = rows, first, sizes
        before = torch.tensor(sizes)
        self.shift = first - (before.cumsum(0) - before)
        """What is added to a token's number to find its row."""

    @classmethod
    def open(
        cls, places: Sequence[tuple[Path, int]], sizes: Sequence[int], dtype: torch.dtype, shape: Sequence[int]
    ) -> MappedColumn | None:
        """places: file of each shard and the byte at which the column starts in it; None where this cannot be done."""
        row_bytes = torch.Size(shape).numel() * dtype.itemsize
        spans = _layout([start for _, start in places], sizes, row_bytes)
        if os.name != "posix" or os.sysconf("SC_PAGE_SIZE") != PAGE or spans is None or sum(sizes) == 0:
            return None
        addresses, total = spans
        region = _reserve(total)
        if region is None:
            return None
        base, buffer = region
        for (path, start), size, address in zip(places, sizes, addresses, strict=True):
            if size and not _map(path, start, size * row_bytes, base + address):
                return None  # the buffer's end gives the range back
        origin = addresses[0] + places[0][1] % PAGE
        n_rows = (total - origin) // row_bytes
        rows = torch.frombuffer(buffer, dtype=dtype, count=n_rows * row_bytes // dtype.itemsize, offset=origin)
        first = [(a + start % PAGE - origin) // row_bytes for a, (_, start) in zip(addresses, places, strict=True)]
        return cls(rows.view(n_rows, *shape), torch.tensor(first), sizes)

    def block(self, shard: int) -> Tensor:
        start = int(self.first[shard])
        return self.rows[start : start + self.sizes[shard]]


def _layout(starts: Sequence[int], sizes: Sequence[int], row_bytes: int) -> tuple[list[int], int] | None:
    """Offset of each shard's pages in the reserved range, and its length; None where the rows cannot meet one grid."""
    addresses, end, origin = list[int](), 0, starts[0] % PAGE
    shared = math.gcd(PAGE, row_bytes)
    for start, size in zip(starts, sizes, strict=True):
        wanted = (origin - start % PAGE - end) % row_bytes  # = step * PAGE, modulo a row
        if wanted % shared:
            return None
        step = wanted // shared * pow(PAGE // shared, -1, row_bytes // shared) % (row_bytes // shared)
        address = end + step * PAGE
        addresses.append(address)
        end = address + -(-(start % PAGE + size * row_bytes) // PAGE) * PAGE
    return addresses, end


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
    ]  # fmt: skip
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return library


def _reserve(n_bytes: int) -> tuple[int, ctypes.Array[ctypes.c_char]] | None:
    """A range of addresses as a buffer; it is given back when the last tensor on it is gone."""
    library = _library()
    base = library.mmap(None, n_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if base is None or base == FAILED:
        return None
    buffer = (ctypes.c_char * n_bytes).from_address(base)
    weakref.finalize(buffer, library.munmap, base, n_bytes).atexit = False
    return base, buffer


def _map(path: Path, start: int, n_bytes: int, address: int) -> bool:
    """Map `n_bytes` of a file from byte `start`; writing into them would change our copy, never the file."""
    handle = os.open(path, os.O_RDONLY)
    try:
        skip = start % PAGE
        found = _library().mmap(
            address, skip + n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, handle,
            start - skip,
        )  # fmt: skip
    finally:
        os.close(handle)
    return found == address
