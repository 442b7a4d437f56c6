"""One short file per kind of block, found by scanning this folder: each ends with a constant `BLOCKS`.

A block is a class of module that any network may contain; `interp.models.family.register_block` adds a user's own.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from interp.models.family import Block


@cache
def known_blocks() -> dict[str, tuple[Block, ...]]:
    """Every kind of block, by the class names it serves."""
    found: dict[str, tuple[Block, ...]] = {}
    for info in pkgutil.iter_modules(__path__):
        blocks: tuple[Block, ...] = importlib.import_module(f"{__name__}.{info.name}").BLOCKS
        for block in blocks:
            for name in block.classes:
                found[name] = (*found.get(name, ()), block)
    return found
