"""Speed of the store against the raw file system: what `interp bench` times.

`write_systems`: 199,936 x 576 float16 rows (230 MB) to the disk, each write followed by fsync. The store also writes
token columns, checksums and sidecars, and does it in shards of 16,384 rows; the statistics are timed by themselves.
`read_systems`: 20 batches of 2,048 random rows. The raw row gathers with `torch.index_select` from one mapped file.
The shape is layer 10 of SmolLM2-135M.
Beware: numbers of a shared disk vary; time the two alternately and compare medians. The checksum takes a second core
for about as long as the raw write takes; with every core busy the store is as much slower as that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from interp.core.seed import torch_generator
from interp.instrument.shards import BLOCK_BYTES
from interp.instrument.statistics import Statistics
from interp.instrument.store_folders import LocalFolder
from interp.instrument.store_reader import MappedColumns
from interp.instrument.store_writer import ShardWriter

ROWS, WIDTH, SHARD_ROWS = 199_936, 576, 16_384
BATCHES, BATCH_ROWS = 20, 2_048
SITE = "resid_post.10"

Systems = dict[str, Callable[[], object]]


def bench_rows(rows: int = ROWS) -> Tensor:
    """Rows to be written, the same each time."""
    return torch.randn(rows, WIDTH, generator=torch_generator(0, "store bench")).half()


def write_systems(folder: Path, rows: int = ROWS) -> Systems:
    """Each writes all the rows into `folder` and waits for the disk."""
    x = bench_rows(rows)
    return {
        "raw write": lambda: _write_raw(folder / "raw.bin", x),
        "store write": lambda: _write_store(folder / "store", x),
        "store statistics": lambda: [Statistics.of(part, (None, None, None)) for part in x.split(SHARD_ROWS)],
    }


def read_systems(folder: Path, rows: int = ROWS) -> Systems:
    """Each gathers the same random rows; the files are written here first."""
    x = bench_rows(rows)
    _write_raw(folder / "raw.bin", x)
    _write_store(folder / "store", x)
    raw = torch.from_file(str(folder / "raw.bin"), size=x.numel(), dtype=x.dtype).view(x.shape)
    sizes = [len(part) for part in x.split(SHARD_ROWS)]
    files = [f"shard-{i:05d}.safetensors" for i in range(len(sizes))]
    store = MappedColumns(LocalFolder(folder / "store"), files, sizes, {SITE: (x.dtype, (WIDTH,))})
    generator = torch_generator(0, "store bench", "rows")
    wanted = [torch.randint(rows, (BATCH_ROWS,), generator=generator) for _ in range(BATCHES)]
    return {
        "raw gather": lambda: [raw.index_select(0, index) for index in wanted],
        "store gather": lambda: [store.gather(SITE, index) for index in wanted],
    }


def _write_raw(path: Path, x: Tensor) -> None:
    view = x.view(torch.uint8).numpy().reshape(-1).data
    with _created(path) as handle:
        for start in range(0, len(view), BLOCK_BYTES):
            os.write(handle, view[start : start + BLOCK_BYTES])
        os.fsync(handle)


@contextmanager
def _created(path: Path) -> Generator[int, None, None]:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        yield handle
    finally:
        os.close(handle)


def _write_store(path: Path, x: Tensor) -> None:
    folder = LocalFolder(path)
    folder.make()
    with ShardWriter(folder) as writer:
        for shard, part in enumerate(x.split(SHARD_ROWS)):
            number = torch.arange(len(part)) + shard * SHARD_ROWS
            columns = {SITE: [part], "ids": [number % 49_152], "row": [number // 512], "pos": [number % 512]}
            writer.submit(shard, columns)
