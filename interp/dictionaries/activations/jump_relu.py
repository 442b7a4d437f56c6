"""JumpReLU: f = z where z exceeds the latent's own threshold, else 0.

The step has no useful gradient, so the threshold gets a straight-through one, with rect(t) = 1 for |t| < 1/2:
    df/dtheta = -(theta / eps) rect((z - theta) / eps) ;  dH(z - theta)/dtheta = -(1 / eps) rect((z - theta) / eps)
    df/dz = 1[z > theta] ;  dH/dz = 0
theta = exp(log_threshold), so that it stays positive. eps is the bandwidth, in the units of z.
Paper: S. Rajamanoharan et al., Jumping ahead, 2024, https://arxiv.org/abs/2407.14435 (equations 11 and 12).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.core.errors import InterpError
from interp.dictionaries.activations.base import Activation, Inputs, Selected


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return z * (z > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        z, threshold = ctx.saved_tensors
        window = ((z - threshold) / ctx.bandwidth).abs() < 0.5
        to_threshold = -(threshold / ctx.bandwidth) * (window * grads[0]).sum(0)
        return (z > threshold) * grads[0], to_threshold, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        z, threshold = ctx.saved_tensors
        window = ((z - threshold) / ctx.bandwidth).abs() < 0.5
        return None, -(window * grads[0]).sum(0) / ctx.bandwidth, None


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    out = function.apply(*arguments)
    assert isinstance(out, Tensor)
    return out


class JumpReLU(Activation):
    """z above a learned threshold per latent."""

    kind = "jump_relu"
    dense = True

    def __init__(self, d_dict: int, *, threshold: float = 0.01, bandwidth: float = 0.05) -> None:
        super().__init__()
        if threshold <= 0 or bandwidth <= 0:
            raise InterpError(f"threshold={threshold} and bandwidth={bandwidth} must be positive")
        self.bandwidth = bandwidth
        self.log_threshold = nn.Parameter(torch.full((d_dict,), math.log(threshold)))

    @property
    def threshold(self) -> Float[Tensor, "d_dict"]:
        return self.log_threshold.exp()

    def active(self, inputs: Inputs) -> Selected:
        return inputs.above(self.threshold)

    def values(self, z: Float[Tensor, "batch d_dict"], b_enc: Float[Tensor, "d_dict"]) -> Float[Tensor, "batch d_dict"]:
        return _apply(_Jump, z, self.threshold.to(z.dtype), self.bandwidth)

    def fired(self, z: Float[Tensor, "batch d_dict"]) -> Float[Tensor, "batch d_dict"]:
        """1 where the latent fires; its gradient reaches the threshold alone."""
        return _apply(_Step, z, self.threshold.to(z.dtype), self.bandwidth)

    def settings(self) -> Mapping[str, Any]:
        return {"bandwidth": self.bandwidth}

    @torch.no_grad()
    def rescale(self, factors: Float[Tensor, "d_dict"]) -> None:
        self.log_threshold.add_(factors.log().to(self.log_threshold.dtype))

    @torch.no_grad()
    def restart(self, latents: Int[Tensor, "n"], z: Float[Tensor, "n"], b_enc: Float[Tensor, "n"]) -> None:
        """Thresholds at half of z, unless they are lower."""
        half = (z / 2).log().to(self.log_threshold.dtype)
        self.log_threshold[latents] = torch.minimum(self.log_threshold[latents], half)

    def homogeneous(self) -> bool:
        return True
