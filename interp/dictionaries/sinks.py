"""Which tokens carry massive activations, so that training and metrics can leave them out.

At the first position of many models the residual norm is a hundred times that of any other token (SmolLM2-135M after
block 15: 23,800 against 170). One such row holds more variance than ten thousand others; an FVU that includes it says
nothing about the rest. A token is dropped when its norm exceeds `ratio` times the median norm. (Circuit card C7; M. Sun
et al., Massive activations in large language models, 2024, https://arxiv.org/abs/2402.17762.)
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.core.errors import InterpError


def ordinary(x: Float[Tensor, "*batch d"], ratio: float, *, median: float | None = None) -> Bool[Tensor, "*batch"]:
    """True for tokens whose norm is at most `ratio` times the median (of x, unless given). Ratio 0 keeps all."""
    if ratio < 0:
        raise InterpError(f"ratio={ratio} must be positive, or 0 to keep every token")
    norms = x.float().norm(dim=-1)
    if ratio == 0 or norms.numel() == 0:
        return torch.ones_like(norms, dtype=torch.bool)
    return norms <= ratio * (float(norms.median()) if median is None else median)
