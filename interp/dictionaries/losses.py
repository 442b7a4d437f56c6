"""Losses of the top-k autoencoder.

Reconstruction:  FVU = sum |y - y_hat|^2 / sum |y - mean y|^2, over the tokens and coordinates of the batch.
Auxiliary (AuxK): the k_aux largest latents among the dead ones reconstruct the error e = y - y_hat (a constant):
    |decode(f_dead) - e|^2 / |e - mean e|^2, without b_dec, zero where the error has no variance.
Paper: L. Gao et al., 2024, appendix A.2, https://arxiv.org/abs/2406.04093 (weight 1/32, k_aux about d_in / 2).
The auxiliary loss trains the encoder of the dead latents as well as their decoder rows; a fused encoder that returns
no gradient for the pre-activations it did not select would leave them dead.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.dictionaries.sae import TopKSAE


def fvu_loss(target: Float[Tensor, "batch d"], output: Float[Tensor, "batch d"]) -> Float[Tensor, ""]:
    """Fraction of the batch's variance left unexplained."""
    variance = (target - target.mean(0)).square().sum()
    return (target - output).square().sum() / variance.clamp_min(torch.finfo(target.dtype).tiny)


def auxk_loss(
    sae: TopKSAE,
    u: Float[Tensor, "batch d_in"],
    z: Float[Tensor, "batch d_dict"],
    error: Float[Tensor, "batch d_in"],
    dead: Bool[Tensor, "d_dict"],
) -> Float[Tensor, ""]:
    """How badly the dead latents reconstruct the error; 0 without dead latents."""
    pool = dead.nonzero()[:, 0]
    k_aux = min(max(sae.d_in // 2, 1), len(pool))
    if k_aux == 0:
        return u.new_zeros(())
    with torch.no_grad():
        selected, position = z[:, pool].topk(k_aux, dim=-1, sorted=False)
        e = error.detach()
        variance = (e - e.mean(0)).square().sum()
    codes = sae.latents(u, selected, pool[position])
    missed = (sae.combine(codes) - e).square().sum()
    return torch.nan_to_num(missed / variance, nan=0.0, posinf=0.0)
