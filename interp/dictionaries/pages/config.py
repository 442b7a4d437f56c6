"""What feature pages show, and how much of it: one frozen value with checked fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from interp.core.errors import InterpError

Wanted = int | Literal["all"] | tuple[int, ...]
"""So many random live latents, all live ones, or the ones named."""


@dataclass(frozen=True, kw_only=True)
class PagesConfig:
    """Defaults follow SAEDashboard: 20 top examples, 10 equal intervals of 5, 50 bins, 10 tokens on each side."""

    latents: Wanted = 100
    """A number draws live latents at random; naming them makes the pages a choice, which they then say."""
    min_firings: int = 10
    """Latents that fire at fewer counted tokens are too rare to show; the share that was left out is said."""
    n_top: int = 20
    """Examples with the largest activations."""
    n_intervals: int = 10
    """Equal intervals of (0, max], each with its own random examples."""
    n_per_interval: int = 5
    n_bins: int = 50
    """Bins of both histograms; a multiple of n_intervals."""
    before: int = 16
    """Tokens shown before the example's token."""
    after: int = 8
    """Tokens shown after it."""
    same_window: int = 4
    """Two examples of one latent with equal tokens this far to both sides are one example: the stronger is kept."""
    n_tokens_listed: int = 10
    """Tokens at either end of the logit table."""
    n_neighbours: int = 5
    """Rows of each table of neighbours."""
    n_ablated: int = 5
    """Top examples at which the latent is zeroed; 0 leaves the ablation out."""
    drop_norm: float = 10.0
    """Leave out each row's first token and tokens whose norm exceeds this multiple of the median; 0 keeps all."""
    seed: int = 0
    """Which latents are drawn, which examples fill the intervals, and which latent is whose null."""
    chunk: int | None = None
    """Latents handled at once; from the memory that tables of this width take, if not said."""

    def __post_init__(self) -> None:
        named = self.latents if isinstance(self.latents, tuple) else ()
        if self.latents != "all" and not named and (not isinstance(self.latents, int) or self.latents < 1):
            raise InterpError(f"latents={self.latents!r}; give a number from 1, 'all', or the latents themselves")
        for name in ("min_firings", "n_top", "n_intervals", "n_per_interval", "n_bins", "n_tokens_listed"):
            if getattr(self, name) < 1:
                raise InterpError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("before", "after", "same_window", "n_neighbours", "n_ablated", "drop_norm"):
            if getattr(self, name) < 0:
                raise InterpError(f"{name}={getattr(self, name)} must not be below 0")
        if self.n_bins % self.n_intervals:
            raise InterpError(f"n_bins={self.n_bins} must be a multiple of n_intervals={self.n_intervals}")
        if self.chunk is not None and self.chunk < 1:
            raise InterpError(f"chunk={self.chunk} must be at least 1")
