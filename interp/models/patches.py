"""Tokens of an image: which position of a vision transformer is which patch, which are CLS and registers?

Position 0 is CLS, registers follow where there are any, then the patches, row by row from the top left. A record says
this for one model and one size of image, so that an edit can name a patch and a pattern can be drawn over the image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import InterpError
from interp.models.model import LoadedModel

Kind = Literal["cls", "register", "patch"]


@dataclass(frozen=True, kw_only=True, eq=False)
class PatchRecord:
    """The positions of one image; the same for every image of this size."""

    kinds: tuple[Kind, ...]
    """One per position."""
    grid: tuple[int, int]
    """Rows and columns of patches."""
    patch_size: tuple[int, int]
    """Height and width of a patch in pixels."""

    @property
    def n_pos(self) -> int:
        return len(self.kinds)

    @property
    def special(self) -> Bool[Tensor, " pos"]:
        """True on CLS and registers."""
        return torch.tensor([kind != "patch" for kind in self.kinds])

    @property
    def first_patch(self) -> int:
        return self.kinds.index("patch")

    @property
    def coordinates(self) -> Int[Tensor, "pos 2"]:
        """Row and column of each patch; -1 for what is no patch."""
        rows, columns = self.grid
        places = [(row, column) for row in range(rows) for column in range(columns)]
        return torch.tensor([(-1, -1)] * self.first_patch + places)

    def position(self, row: int, column: int) -> int:
        """The position of a patch, counted from the top left."""
        if not (0 <= row < self.grid[0] and 0 <= column < self.grid[1]):
            raise InterpError(f"no patch ({row}, {column}): the grid is {self.grid[0]} by {self.grid[1]}")
        return self.first_patch + row * self.grid[1] + column

    def box(self, position: int) -> tuple[int, int, int, int]:
        """Pixels of a patch: first row, first column, and the last ones plus one."""
        if not self.first_patch <= position < self.n_pos:
            last = self.n_pos - 1
            raise InterpError(f"position {position} is no patch; patches are positions {self.first_patch} to {last}")
        row, column = divmod(position - self.first_patch, self.grid[1])
        height, width = self.patch_size
        return row * height, column * width, (row + 1) * height, (column + 1) * width

    def on_grid(self, values: Float[Tensor, "*lead pos"]) -> Float[Tensor, "*lead row column"]:
        """Values of positions as a map over the image; CLS and registers are left out."""
        if values.shape[-1] != self.n_pos:
            raise InterpError(f"the last axis has {values.shape[-1]} positions, the record {self.n_pos}")
        return values[..., self.first_patch :].unflatten(-1, self.grid)


def patch_record(model: LoadedModel, height: int | None = None, width: int | None = None) -> PatchRecord:
    """The record of a vision transformer for images of this size; by default the size it was built for."""
    family, config = model.table.family, cast(Any, getattr(model.module, "config", None))
    if family is None or family.inputs != "pixels" or not hasattr(config, "patch_size"):
        raise InterpError(f"{model.source} is no vision transformer with a known table; it has no patches")
    size, own = _pair(config.patch_size), _pair(config.image_size)
    image = (height or own[0], width or own[1])
    if image[0] % size[0] or image[1] % size[1]:
        raise InterpError(f"an image of {image[0]} x {image[1]} pixels is not made of {size[0]} x {size[1]} patches")
    grid = (image[0] // size[0], image[1] // size[1])
    registers = int(getattr(config, "num_register_tokens", 0) or 0)
    kinds: tuple[Kind, ...] = ("cls",) + ("register",) * registers + ("patch",) * (grid[0] * grid[1])
    return PatchRecord(kinds=kinds, grid=grid, patch_size=size)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
