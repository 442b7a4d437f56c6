"""The files of an activation store: its manifest, its shards, and what can be wrong with them.

`manifest.json` names the format and, for each shard, its number of tokens, size and SHA-256; a shard is one safetensors
file. Nothing here knows about models; `interp.instrument.store` does.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from interp.core.errors import ArtefactError

FORMAT, VERSION = "interp-activation-store", 1
MANIFEST = "manifest.json"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def write_shard(folder: Path, number: int, parts: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Join the parts into one file; returns its line of the manifest."""
    path = folder / f"shard-{number:05d}.safetensors"
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    save_file(tensors, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"file": path.name, "tokens": len(tensors["ids"]), "bytes": path.stat().st_size, "sha256": sha256(path)}


def sha256(path: Path) -> str:
    """Checksum of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_shards(folder: Path, manifest: Mapping[str, Any], *, checksums: bool) -> None:
    """Every shard is there, whole, and (with `checksums`) unchanged."""
    for shard in manifest["shards"]:
        path = folder / shard["file"]
        if not path.is_file():
            raise ArtefactError(f"{path} is missing; delete {folder} and capture again")
        size = path.stat().st_size
        if size != shard["bytes"]:
            raise ArtefactError(f"{path} has {size} bytes, expected {shard['bytes']}: it is truncated")
        if checksums and sha256(path) != shard["sha256"]:
            raise ArtefactError(f"{path} does not match its checksum; delete {folder} and capture again")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a store folder, checked for what the reader relies on."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtefactError(f"{folder} is not an activation store: it has no {MANIFEST}")
    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
        if raw.get("format") != FORMAT:
            raise ArtefactError(f"{path} is not the manifest of an activation store")
        if raw["version"] != VERSION:
            raise ArtefactError(f"{path} has version {raw['version']!r}, this release reads {VERSION}")
        shards = [(str(s["file"]), int(s["tokens"]), int(s["bytes"]), str(s["sha256"])) for s in raw["shards"]]
        if any(Path(file).name != file for file, *_ in shards):
            raise ArtefactError(f"{path} names a shard outside its folder")
        if sum(tokens for _, tokens, *_ in shards) != raw["tokens"] or raw["dtype"] not in DTYPES:
            raise ArtefactError(f"{path} contradicts itself; delete {folder} and capture again")
        if not all(math.prod(shape) > 0 for shape in raw["sites"].values()):
            raise ArtefactError(f"{path} lists a site without coordinates")
    except ArtefactError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:  # ValueError: JSON and UTF-8 too
        raise ArtefactError(f"{path} is damaged or foreign: {type(error).__name__}: {error}") from error
    return raw
