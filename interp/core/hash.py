"""Content hashes: a cache key or a provenance entry is the hash of what it names, never a user's label."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DIGITS = 16
"""Hex digits kept (64 bits): enough for a cache of billions of entries."""


def hash_bytes(*chunks: bytes) -> str:
    """Hash of the concatenated chunks."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()[:DIGITS]


def hash_file(path: Path) -> str:
    """Hash of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:DIGITS]


def hash_json(value: Any) -> str:
    """Hash of a JSON-able value; key order does not matter."""
    return hash_bytes(json.dumps(value, sort_keys=True, default=str).encode())


def _raw_bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def hash_tensors(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> str:
    """Hash of named tensors: names, dtypes, shapes and every byte; order of names does not matter."""
    items = dict(tensors)
    digest = hashlib.sha256()
    for name in sorted(items):
        tensor = items[name]
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(_raw_bytes(tensor))
    return digest.hexdigest()[:DIGITS]
