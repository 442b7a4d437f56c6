"""What does a norm do to one prompt once its denominator is held fixed?

    N(x) = (x - c mean(x)) * factor + shift,  factor = w / scale(x) held at the prompt's own value
c is 1 for layer norm and 0 for RMS norm. With the denominator frozen the norm is affine, and its effect on a direction
v read behind it is the pulled-back direction N^T v = (v * factor) - c mean(v * factor).
w, c and the shift are read off by asking the module itself: N(0) = shift, N(1) = shift if and only if it centres, and
one known vector gives w. So any norm of this form serves, whatever it is called (Gemma's 1 + w too).
Source: E. Ameisen et al. 2025 (circuit tracing), J. Dunefsky et al. 2024, https://arxiv.org/abs/2406.11944, appendix.
Trap: at a token with a massive activation the frozen denominator is that of the massive coordinate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.core.errors import InterpError

TOLERANCE = 2e-3
"""Largest relative difference between the frozen form and what the model computed, in float32."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FrozenNorm:
    """An affine map for each position."""

    factor: Float[Tensor, "pos d"]
    centred: bool
    shift: Float[Tensor, " d"]

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing."""
        return not self.centred and not bool(self.shift.any()) and bool((self.factor == 1).all())

    def push(self, x: Float[Tensor, "*batch pos d"]) -> Float[Tensor, "*batch pos d"]:
        """N(x) with the denominators of the prompt."""
        return self.linear(x) + self.shift

    def linear(self, x: Float[Tensor, "*batch pos d"]) -> Float[Tensor, "*batch pos d"]:
        """N(x) - N(0)."""
        return (x - x.mean(-1, keepdim=True) if self.centred else x) * self.factor

    def pull(self, g: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
        """The direction before the norm that has the effect of g behind it; g begins at position 0."""
        g = g * self.factor[: g.shape[1]]
        return g - g.mean(-1, keepdim=True) if self.centred else g

    def pull_at(self, v: Float[Tensor, "row d"], pos: Tensor) -> Float[Tensor, "row d"]:
        """The same for one position per row."""
        g = v * self.factor[pos]
        return g - g.mean(-1, keepdim=True) if self.centred else g


def identity_norm(n_pos: int, like: Float[Tensor, " d"]) -> FrozenNorm:
    """For sublayers that read or write the stream without a norm."""
    return FrozenNorm(factor=like.new_ones(n_pos, len(like)), centred=False, shift=torch.zeros_like(like))


@torch.no_grad()
def freeze_norm(
    module: nn.Module, x: Float[Tensor, "pos d"], y: Float[Tensor, "pos d"], name: str, tolerance: float = TOLERANCE
) -> FrozenNorm:
    """The norm at the prompt's x, which the model turned into y. Raises InterpError if it is of another form."""
    w, centred, shift = norm_form(module, x[0])
    d = x.shape[-1]
    own = (x - x.mean(-1, keepdim=True) if centred else x) * w
    scale = ((y - shift) * own).sum(-1) / own.square().sum(-1).clamp_min(1e-300)
    made = FrozenNorm(factor=scale[:, None] * w, centred=centred, shift=shift)
    check_close(made.push(x), y, f"{name} (width {d}) is no norm with one denominator per token", tolerance)
    return made


@torch.no_grad()
def norm_form(module: nn.Module, like: Float[Tensor, " d"]) -> tuple[Float[Tensor, " d"], bool, Float[Tensor, " d"]]:
    """w, whether it centres, and the shift of a norm, in the dtype of `like`."""
    weight = next(iter(module.parameters()), None)

    def ask(v: Tensor) -> Tensor:
        return module((v.float() if weight is None else v.to(weight))[None, None])[0, 0].to(like)

    shift = ask(torch.zeros_like(like))
    probe = torch.ones_like(like)
    probe[1::2] = -1
    probe[0] = 2  # no mean of zero by luck
    centred = bool((ask(torch.ones_like(like)) - shift).abs().max() < 1e-3)
    base = probe - probe.mean() if centred else probe
    return (ask(probe) - shift) / (base / base.square().mean().sqrt()), centred, shift


def check_close(found: Tensor, wanted: Tensor, complaint: str, tolerance: float = TOLERANCE) -> float:
    """The largest difference relative to the largest wanted value of the same position; an error above tolerance."""
    gap = (found - wanted).abs().amax(-1) / wanted.abs().amax(-1).clamp_min(1e-12)
    worst = float(gap.max()) if gap.numel() else 0.0
    if not worst <= tolerance:
        raise InterpError(
            f"{complaint}: the frozen form misses the model by {worst:.2g} of its size (at most {tolerance:g}); "
            "attribution graphs serve pre-norm and post-norm transformers with plain attention"
        )
    return worst
