"""Seeds are passed, never set: every random draw takes a generator made here."""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def derive(seed: int, *labels: str | int) -> int:
    """A 63-bit seed that depends on `seed` and the labels, so that independent draws stay independent."""
    text = "/".join(str(part) for part in (seed, *labels))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def torch_generator(seed: int, *labels: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator for one purpose, named by its labels."""
    return torch.Generator(device=device).manual_seed(derive(seed, *labels))


def numpy_generator(seed: int, *labels: str | int) -> np.random.Generator:
    """A numpy generator for one purpose, named by its labels."""
    return np.random.default_rng(derive(seed, *labels))
