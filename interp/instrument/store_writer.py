"""Writing shards beside the forward: one is on its way to the disk while the next is being computed.

At most one shard waits or is written at a time, so memory is that of two shards. The checksum is taken of the bytes in
memory while they are written. What goes wrong in the thread is raised by the next `submit` or by the end of the block.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from interp.instrument.shards import Parts, serialise, shard_name, sidecar_name
from interp.instrument.store_folders import Blocks, Folder


class ShardWriter:
    """Writes shards, each with its sidecar; use as a context manager."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="interp-store")
        self._pending: Future[dict[str, Any]] | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._pool.shutdown(wait=True)

    def submit(self, number: int, parts: Parts) -> None:
        """Write a shard; returns once the one before it is on the disk."""
        self.wait()
        self._pending = self._pool.submit(self._write, number, parts)

    def wait(self) -> dict[str, Any] | None:
        """The sidecar of the last shard, when it is on the disk."""
        pending, self._pending = self._pending, None
        return None if pending is None else pending.result()

    def _write(self, number: int, parts: Parts) -> dict[str, Any]:
        blocks = serialise(parts)
        checksum = self._pool.submit(sha256, blocks)
        name = shard_name(number)
        self.folder.write(name, blocks)
        entry = {
            "file": name,
            "tokens": sum(len(piece) for piece in parts["row"]),
            "rows": max((int(piece.max()) + 1 for piece in parts["row"] if len(piece)), default=0),
            "bytes": sum(len(block) for block in blocks),
            "sha256": checksum.result(),
        }
        self.folder.write(sidecar_name(name), [as_json(entry)])
        return entry


def sha256(blocks: Blocks) -> str:
    """Checksum of a file given as blocks."""
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
