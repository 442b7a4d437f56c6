"""Inputs that are no text: images from a folder, arrays and signals from files, as batches for a capture.

    images:FOLDER?size=224&mean=0.5&std=0.5      RGB, shorter side scaled to `size`, centre cut, (value - mean) / std
    array:PATH.npy      or  array:PATH.npz?name=x    first axis = items; floats as they are, whole numbers as float32

Files are read when a batch is asked for, arrays are mapped, so an input may be larger than memory. Items are numbered
in the order of their paths. Nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import ArtefactError, InterpError, MissingPackageError, unknown
from interp.core.hash import hash_json
from interp.instrument.stream import Batch
from interp.tasks.corpora_files import read_options, unreadable

INPUT_KINDS = ("images:FOLDER?size=224", "array:PATH")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


@dataclass(frozen=True, kw_only=True)
class InputBatches:
    """Items by number, a few per forward."""

    n_items: int
    item: Callable[[int], Tensor]
    rows_per_forward: int
    content: str
    """What the items are, for the hash."""

    @cached_property
    def hash(self) -> str:
        return hash_json(["inputs", self.content, self.n_items])

    @property
    def cut(self) -> str:
        return f"{self.rows_per_forward} rows per forward"

    @property
    def n_batches(self) -> int:
        return -(-self.n_items // self.rows_per_forward)

    @property
    def n_tokens(self) -> int | None:
        """How many positions an item has only the model tells."""
        return None

    def batch(self, number: int) -> Batch:
        if not 0 <= number < self.n_batches:
            raise InterpError(f"no batch {number}: there are batches 0 to {self.n_batches - 1}")
        first = number * self.rows_per_forward
        rows = range(first, min(first + self.rows_per_forward, self.n_items))
        return Batch(number=number, rows=torch.tensor(rows), inputs=torch.stack([self.item(row) for row in rows]))


def is_input(name: str) -> bool:
    """Whether the name is of a kind that this file reads."""
    return name.partition(":")[0] in ("images", "array")


def load_inputs(name: str, *, rows_per_forward: int = 8, limit: int | None = None) -> InputBatches:
    """The inputs a name stands for, at most `limit` items."""
    if rows_per_forward < 1 or (limit is not None and limit < 1):
        raise InterpError(f"rows_per_forward={rows_per_forward} and limit={limit} must be at least 1")
    kind, _, rest = name.partition(":")
    place = rest.partition("?")[0]
    known = {"images": ("size", "mean", "std"), "array": ("name",)}.get(kind)
    if known is None or not place:
        raise unknown("input", name, INPUT_KINDS)
    options = read_options(name, known)
    path = Path(place).expanduser()
    n, item, content = _images(path, options) if kind == "images" else _array(path, options)
    return InputBatches(
        n_items=n if limit is None else min(n, limit), item=item, rows_per_forward=rows_per_forward, content=content
    )


def _number(options: Mapping[str, str], key: str, default: float) -> float:
    try:
        return float(options.get(key, default))
    except ValueError as error:
        raise InterpError(f"{key}={options[key]} should be a number") from error


def _images(folder: Path, options: Mapping[str, str]) -> tuple[int, Callable[[int], Tensor], str]:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingPackageError("images need Pillow: pip install pillow") from error
    if not folder.is_dir():
        raise unreadable(folder, NotADirectoryError("it is no folder of images"))
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES)
    if not paths:
        raise ArtefactError(f"{folder} holds no image ({', '.join(IMAGES)})")
    size, mean, std = (_number(options, k, d) for k, d in (("size", 224), ("mean", 0.0), ("std", 1.0)))
    if size < 1 or size != int(size) or std <= 0:
        raise InterpError(f"size={size:g} must be a whole number of pixels and std={std:g} above 0")

    def item(number: int) -> Float[Tensor, "3 height width"]:
        try:
            with Image.open(paths[number]) as image:
                found = _cropped(image.convert("RGB"), int(size))
        except OSError as error:
            raise ArtefactError(f"{paths[number]} is no image that can be read: {error}") from error
        return (torch.from_numpy(np.asarray(found).copy()).permute(2, 0, 1).float() / 255 - mean) / std

    stamps = [[path.relative_to(folder).as_posix(), _digest(path)] for path in paths]
    return len(paths), item, hash_json([stamps, size, mean, std])


def _digest(path: Path) -> str:
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cropped(image: Any, size: int) -> Any:
    """The shorter side scaled to `size` (bilinear), then the middle cut out."""
    width, height = image.size
    scale = size / min(width, height)
    image = image.resize((max(size, round(width * scale)), max(size, round(height * scale))), 2)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _array(path: Path, options: Mapping[str, str]) -> tuple[int, Callable[[int], Tensor], str]:
    try:
        found: Any = np.load(path, mmap_mode="r" if path.suffix == ".npy" else None, allow_pickle=False)
        if path.suffix == ".npz":
            name = options.get("name") or found.files[0]
            if name not in found.files:
                raise unknown(f"array in {path}", name, found.files)
            found = found[name]
    except (OSError, ValueError, EOFError) as error:
        if isinstance(error, InterpError):
            raise
        if not path.exists():
            raise unreadable(path, error) from error
        raise ArtefactError(f"{path} is no array that can be read without unpickling: {error}") from error
    if found.ndim < 2 or not len(found) or found.dtype.kind not in "fiub":
        raise ArtefactError(
            f"{path} holds {found.dtype} {found.shape}; it should hold numbers, items along its first axis"
        )

    def item(number: int) -> Tensor:
        values = np.asarray(found[number])
        return torch.from_numpy(values.copy() if values.dtype.kind == "f" else values.astype(np.float32))

    return len(found), item, f"{_digest(path)}:{options.get('name', '')}"
