"""What a dictionary is: a map to sparse codes and a linear map back.

    codes = dictionary.encode(x)          # SparseCodes
    x_hat = dictionary.decode(codes)

Orientation is x @ W everywhere: W_enc (d_in, d_dict), W_dec (d_dict, d_out). Rows of `features` are directions in the
units of the activations themselves: adding features[i] to an activation adds 1 to the code's contribution.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import InterpError
from interp.dictionaries.codes import SparseCodes


@runtime_checkable
class Dictionary(Protocol):
    """Implemented by SAEs, baselines, transcoders and codebooks."""

    @property
    def d_in(self) -> int: ...
    @property
    def d_dict(self) -> int: ...
    @property
    def features(self) -> Float[Tensor, "d_dict d_out"]: ...
    def encode(self, x: Float[Tensor, "*batch d_in"]) -> SparseCodes: ...
    def decode(self, codes: SparseCodes) -> Float[Tensor, "*batch d_out"]: ...


def reconstruct(dictionary: Dictionary, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
    """decode(encode(x)), without a graph."""
    with torch.no_grad():
        return dictionary.decode(dictionary.encode(x))


def check_width(x: Tensor, d_in: int) -> None:
    """Last axis of x is d_in."""
    if x.shape[-1] != d_in:
        raise InterpError(f"activations of width {x.shape[-1]} do not fit a dictionary with d_in={d_in}")


def rows(x: Float[Tensor, "n d"], batch_size: int) -> Iterator[Float[Tensor, "batch d"]]:
    """Consecutive blocks of rows; the last may be shorter."""
    if batch_size < 1:
        raise InterpError(f"batch_size={batch_size} must be at least 1")
    yield from x.split(batch_size) if len(x) else ()
