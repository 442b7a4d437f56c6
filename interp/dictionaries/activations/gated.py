"""Gated: one map decides which latents fire, another how strongly, with shared directions.

    pi = u W_enc + b_enc                                  (the gate; its own bias)
    f  = 1[pi > 0] * relu((u W_enc) * exp(r_mag) + b_mag)   (the magnitude)
The gate has no gradient through f; its penalty relu(pi) and an auxiliary reconstruction from relu(pi) train it
(`interp.dictionaries.losses.gated_auxiliary`).
Paper: S. Rajamanoharan et al., Improving dictionary learning with gated sparse autoencoders, 2024,
https://arxiv.org/abs/2404.16014. With r_mag = 0 and b_mag = b_enc it is the ReLU.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.dictionaries.activations.base import Activation, Inputs, Selected


class Gated(Activation):
    """Gate and magnitude of each latent, tied up to a scale and a bias."""

    kind = "gated"
    dense = True

    def __init__(self, d_dict: int) -> None:
        super().__init__()
        self.r_mag = nn.Parameter(torch.zeros(d_dict))
        self.b_mag = nn.Parameter(torch.zeros(d_dict))

    def active(self, inputs: Inputs) -> Selected:
        return inputs.above(0.0)

    def amplitudes(
        self, z: Float[Tensor, "batch k"], indices: Int[Tensor, "batch k"], b_enc: Float[Tensor, "d_dict"]
    ) -> Float[Tensor, "batch k"]:
        rise = self.r_mag.exp().to(z.dtype)[indices]
        return ((z - b_enc[indices]) * rise + self.b_mag.to(z.dtype)[indices]).relu() * (z > 0)

    def values(self, z: Float[Tensor, "batch d_dict"], b_enc: Float[Tensor, "d_dict"]) -> Float[Tensor, "batch d_dict"]:
        magnitude = ((z - b_enc) * self.r_mag.exp().to(z.dtype) + self.b_mag.to(z.dtype)).relu()
        return magnitude * (z > 0)

    @torch.no_grad()
    def rescale(self, factors: Float[Tensor, "d_dict"]) -> None:
        self.b_mag.mul_(factors.to(self.b_mag.dtype))

    @torch.no_grad()
    def restart(self, latents: Int[Tensor, "n"], z: Float[Tensor, "n"], b_enc: Float[Tensor, "n"]) -> None:
        """As a ReLU."""
        self.r_mag[latents] = 0
        self.b_mag[latents] = b_enc.to(self.b_mag.dtype)

    def homogeneous(self) -> bool:
        return True
