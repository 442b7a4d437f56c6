"""Memory that one caller keeps between calls, and what happened in them. No globals: pass a `Workspace` along.

It holds the dense pre-activations' buffer, the bfloat16 copy of the encoder with its rounding errors, and counters.
Freshly allocated memory has to be paged in, at a fraction of the speed of a copy: that alone is worth keeping it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Counters:
    """How often the certified path was taken, and how it went. All counts are of rows (tokens)."""

    plain: int = 0
    """Selected from dense pre-activations from the start: width, dtype or device do not suit the fast path."""
    fast: int = 0
    """Sent through the fast path."""
    lowered: int = 0
    """Of those, certified only at a second, lower threshold."""
    dense: int = 0
    """Of those, not certified: done again from dense pre-activations."""
    candidates: int = 0
    """Exact products that the certified rows took."""

    @property
    def fallback_rate(self) -> float:
        """Share of the rows of the fast path that were done again densely."""
        return self.dense / max(self.fast, 1)

    @property
    def candidates_per_row(self) -> float:
        return self.candidates / max(self.fast - self.dense, 1)


@dataclass(frozen=True)
class Lowered:
    """An encoder in bfloat16, one row per latent, with columns that turn the product into an upper bound."""

    rows: Tensor
    """[padded m, padded d + 4] bfloat16."""
    norm: float
    """Mean norm of the encoder's columns."""
    rounding: float
    """Mean norm of their rounding errors."""
    largest_norm: float
    largest_bias: float


class Workspace:
    """Buffers and counters of one caller, e.g. one training loop.

    fast: whether to select by certified bfloat16 bounds on a CPU. None decides by the CPU's instructions and the shape,
        so that equal inputs take the same path in every run.
    frozen: promise that the encoder does not change between calls, so that its bfloat16 copy is made once; after a
        change that its version counter does not see (`.data`), call `forget`.
    """

    def __init__(self, *, fast: bool | None = None, frozen: bool = False) -> None:
        self.fast = fast
        self.frozen = frozen
        self.counters = Counters()
        self._buffers: dict[str, Tensor] = {}
        self._lowered: tuple[tuple[float, ...], Lowered] | None = None

    def take(self, name: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """A [rows, columns] matrix with undefined content; the same memory as the last one of this name."""
        held = self._buffers.get(name)
        size = rows * columns
        if held is None or held.numel() < size or held.dtype != dtype or held.device != torch.device(device):
            held = self._buffers[name] = torch.empty(size, dtype=dtype, device=device)
        return held[:size].view(rows, columns)

    def cached(self, key: tuple[float, ...]) -> Lowered | None:
        """The bfloat16 encoder made for `key`, if the caller promised that it still holds."""
        return self._lowered[1] if self.frozen and self._lowered is not None and self._lowered[0] == key else None

    def keep(self, key: tuple[float, ...], lowered: Lowered) -> None:
        self._lowered = (key, lowered)

    def forget(self) -> None:
        """Drop the bfloat16 encoder: a frozen workspace makes it anew at the next call."""
        self._lowered = None

    def reset(self) -> None:
        """Set the counters to zero."""
        self.counters = Counters()

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return sum(t.numel() * t.element_size() for t in self._buffers.values())
