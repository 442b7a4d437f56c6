"""The format of an activation store: what lies in its folder, and how a shard file is laid out.

    plan.json                     what is being written: key, sites with shapes, dtype, input, cut; made first
    shard-00000.safetensors       the rows of batches [0, m): a tensor per site, the token columns, their statistics
    shard-00000.json              its sidecar, made after it: tokens, bytes, sha256; a shard without one does not count
    statistics.safetensors        the statistics of all rows
    manifest.json                 made last; with it the store is complete

Columns of a shard: `ids`, `row`, `pos` (token id, sequence, position; int64); each site by its name; with int8 also
`<site>/scale` (float32, one per token: value = int8 * scale); `<site>/statistics/...`, see `Statistics.tensors`.
A shard is plain safetensors. We write it ourselves because the library's writer copies every tensor once more. Data
begin at a multiple of 4,096 bytes and tensors come by falling alignment of their rows, so that the reader can map the
same column of all shards into one array.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interp.core.errors import ArtefactError
from interp.instrument.store_folders import Folder

FORMAT, VERSION = "interp-activation-store", 2
MANIFEST, PLAN, STATISTICS = "manifest.json", "plan.json", "statistics.safetensors"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
PAGE = 4096
BLOCK_BYTES = 8 << 20
"""What is handed to the file system at once."""
_CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int8: "I8",
}  # fmt: skip

Parts = Mapping[str, Sequence[Tensor]]
"""Column -> its pieces, in order; a column of a shard is their concatenation."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor lies in a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """Byte of the file at which it begins."""
    n_bytes: int


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def sidecar_name(shard: str) -> str:
    return shard.removesuffix(".safetensors") + ".json"


def scale_name(site: str) -> str:
    return f"{site}/scale"


def row_alignment(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """The largest power of two, at most a page, that divides the bytes of one row."""
    n_bytes = dtype.itemsize * math.prod(shape)
    return min(n_bytes & -n_bytes, PAGE)


def serialise(parts: Parts) -> list[memoryview]:
    """The bytes of a safetensors file as blocks of at most 8 MiB; the pieces are not copied."""

    def order(name: str) -> tuple[int, str]:
        first = parts[name][0]
        return (-row_alignment(first.dtype, first.shape[1:]), name)

    header: dict[str, Any] = {"__metadata__": {"format": FORMAT}}
    offset, blocks = 0, list[memoryview]()
    for name in sorted(parts, key=order):
        pieces = [piece.contiguous() for piece in parts[name]]
        n_bytes = sum(piece.numel() * piece.element_size() for piece in pieces)
        header[name] = {
            "dtype": _CODES[pieces[0].dtype],
            "shape": [sum(len(piece) for piece in pieces), *pieces[0].shape[1:]],
            "data_offsets": [offset, offset + n_bytes],
        }
        offset += n_bytes
        for piece in pieces:
            if piece.numel():
                raw = piece.reshape(-1).view(torch.uint8).numpy().data
                blocks += [raw[i : i + BLOCK_BYTES] for i in range(0, len(raw), BLOCK_BYTES)]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    return [memoryview(struct.pack("<Q", len(text)) + text), *blocks]


def read_header(folder: Folder, name: str) -> dict[str, Place]:
    """Where each tensor of a shard lies. ArtefactError if the file is no safetensors file or is cut short."""
    try:
        (size,) = struct.unpack("<Q", folder.read(name, 0, 8))
        total = folder.size(name) or 0
        if 8 + size > total:
            raise ValueError(f"a header of {size} bytes in a file of {total}")
        raw: dict[str, Any] = json.loads(folder.read(name, 8, 8 + size))
        found: dict[str, Place] = {}
        for tensor, entry in raw.items():
            if tensor == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            found[tensor] = Place(
                dtype=str(entry["dtype"]), shape=tuple(entry["shape"]), start=8 + size + start, n_bytes=end - start
            )
            if start < 0 or end < start or 8 + size + end > total:
                raise ValueError(f"{tensor} ends at byte {8 + size + end} of {total}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ArtefactError(f"{folder / name} is damaged: {error}") from error
    return found


def read_manifest(folder: Folder) -> dict[str, Any]:
    """The manifest of a store folder, checked for what the reader relies on."""
    if not folder.exists(MANIFEST):
        raise ArtefactError(_not_complete(folder))
    path = folder / MANIFEST
    try:
        raw: Any = json.loads(folder.read(MANIFEST).decode("utf-8"))
        if raw.get("format") != FORMAT:
            raise ArtefactError(f"{path} is not the manifest of an activation store")
        if raw["version"] != VERSION:
            raise ArtefactError(f"{path} has version {raw['version']!r}, this release reads {VERSION}; capture again")
        shards = [
            (str(s["file"]), int(s["tokens"]), int(s["bytes"]), str(s["sha256"]), int(s["row_offset"]))
            for s in raw["shards"]
        ]
        if any("/" in file or "\\" in file or not file.endswith(".safetensors") for file, *_ in shards):
            raise ArtefactError(f"{path} names a shard outside its folder")
        if sum(tokens for _, tokens, *_ in shards) != raw["tokens"] or raw["dtype"] not in DTYPES:
            raise ArtefactError(f"{path} contradicts itself; delete {folder} and capture again")
        if not all(math.prod(shape) > 0 for shape in raw["sites"].values()):
            raise ArtefactError(f"{path} lists a site without coordinates")
        if (
            not isinstance(raw["parts"], list)
            or not isinstance(raw["columns"], list)
            or not isinstance(raw["key"], str)
        ):
            raise TypeError("parts, columns or key of another type")
    except ArtefactError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:  # ValueError: JSON and UTF-8 too
        raise ArtefactError(f"{path} is damaged or foreign: {type(error).__name__}: {error}") from error
    return raw


def _not_complete(folder: Folder) -> str:
    """What to say of a folder without manifest."""
    if not folder.exists(PLAN):
        return f"{folder} is not an activation store: it has no {MANIFEST}"
    try:
        total = int(json.loads(folder.read(PLAN))["n_shards"])
    except (KeyError, TypeError, ValueError, OSError) as error:
        return f"{folder / PLAN} is damaged: {error}; delete {folder} and capture again"
    done = sum(read_sidecar(folder, shard_name(number)) is not None for number in range(total))
    return f"{folder} is unfinished: {done} of {total} shards; run the same capture again to go on"


def read_sidecar(folder: Folder, shard: str) -> dict[str, Any] | None:
    """The sidecar of a shard that is there with the size it should have; None where the shard has to be written."""
    try:
        raw: Any = json.loads(folder.read(sidecar_name(shard)))
        entry = {
            "file": shard,
            "tokens": int(raw["tokens"]),
            "rows": int(raw["rows"]),
            "bytes": int(raw["bytes"]),
            "sha256": str(raw["sha256"]),
        }
    except (OSError, ValueError, KeyError, TypeError):  # killed before it was whole, or never written
        return None
    return entry if raw == entry and folder.size(shard) == entry["bytes"] else None


def check_shards(folder: Folder, manifest: Mapping[str, Any], *, checksums: bool) -> None:
    """Every file is there, whole, and (with `checksums`) unchanged."""
    for entry in (*manifest["shards"], manifest["statistics"]):
        problem = file_problem(folder, entry, checksums=checksums)
        if problem:
            raise ArtefactError(f"{folder / entry['file']} {problem}; delete {folder} and capture again")


def file_problem(folder: Folder, entry: Mapping[str, Any], *, checksums: bool) -> str | None:
    """What is wrong with a file that should have `bytes` and `sha256`, or None."""
    size = folder.size(entry["file"])
    if size is None:
        return "is missing"
    if size != entry["bytes"]:
        kind = "truncated" if size < entry["bytes"] else "too long"
        return f"has {size} bytes, expected {entry['bytes']}: it is {kind}"
    if checksums and folder.sha256(entry["file"]) != entry["sha256"]:
        return "does not match its checksum"
    return None
