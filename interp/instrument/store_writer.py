"""Writing shards beside the forward: one is on its way to the disk while the next is being computed.

Two stages: the bytes are written while their checksum is taken; then, while the next shard is written, the disk is
waited for, and the shard gets its name and its sidecar. One shard is in the first stage at a time and none waits, so
memory is that of two shards. What goes wrong in a thread is raised by the next `submit` or by the end of the block.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Any

from interp.instrument.shards import Parts, serialise, shard_name, sidecar_name
from interp.instrument.store_folders import Blocks, Draft, Folder


class ShardWriter:
    """Writes shards, each with its sidecar; use as a context manager."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._pool = ThreadPoolExecutor(max_workers=3, thread_name_prefix="interp-store")
        self._pending: Future[Future[None]] | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            with suppress(*([Exception] if kind else [])):  # the error that ended the block comes first
                self.wait()
        finally:
            self._pool.shutdown(wait=True)

    def submit(self, number: int, parts: Parts) -> None:
        """Write a shard; returns once the bytes of the one before it are handed to the disk."""
        before = None if self._pending is None else self._pending.result()
        self._pending = self._pool.submit(self._write, number, parts, before)

    def wait(self) -> None:
        """Until every shard is on the disk."""
        if self._pending is not None:
            self._pending.result().result()

    def _write(self, number: int, parts: Parts, before: Future[None] | None) -> Future[None]:
        blocks, name = serialise(parts), shard_name(number)
        checksum = self._pool.submit(sha256, blocks)
        draft = self.folder.begin(name, blocks)
        with draft.discarded_on_error():
            entry = {
                "file": name,
                "tokens": sum(len(piece) for piece in parts["row"]),
                "rows": max((int(piece.max()) + 1 for piece in parts["row"] if len(piece)), default=0),
                "bytes": sum(len(block) for block in blocks),
                "sha256": checksum.result(),
            }
            if before is not None:
                before.result()
            return self._pool.submit(self._finish, draft, entry)

    def _finish(self, draft: Draft, entry: dict[str, Any]) -> None:
        with draft.discarded_on_error():
            draft.commit()
        self.folder.write(sidecar_name(entry["file"]), [as_json(entry)])


def sha256(blocks: Blocks) -> str:
    """Checksum of a file given as blocks."""
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
