"""How are the directions of a dictionary arranged: copies of each other, encoder along decoder?

decoder_max_cosine  mean over latents of the largest cosine of its decoder row with another row
encoder_max_cosine  the same for encoder columns
encoder_decoder     mean over latents of cos(e_i, d_i)
near_copies         share of latents with another decoder row at a cosine above .9
Chance: random unit rows of the same number and width. Many near copies mean that one feature is stored several times;
the mean of the largest cosine falls where latents are dead (they stay random) and rises with the width. Rows are
compared block by block: 32,768 latents never make a full matrix.
Source: A. Karvonen et al. 2025, SAEBench, https://arxiv.org/abs/2503.09532 (core metrics).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from interp.core.errors import InterpError
from interp.core.seed import torch_generator
from interp.dictionaries.base import Dictionary
from interp.dictionaries.metrics import share

METRICS = {
    "decoder_max_cosine": "v1: mean over latents of the largest cosine of its decoder row with another one",
    "encoder_max_cosine": "v1: mean over latents of the largest cosine of its encoder column with another one",
    "encoder_decoder": "v1: mean over latents of the cosine of its encoder column and its decoder row",
    "near_copies": "v1: share of latents with another decoder row at a cosine above .9",
}
NEAR = 0.9
BLOCK = 1024
"""Rows compared at once."""


@torch.no_grad()
def nearest_rows(
    a: Float[Tensor, "n d"], b: Float[Tensor, "m d"] | None = None, *, block: int = BLOCK
) -> tuple[Float[Tensor, "n"], Int[Tensor, "n"]]:
    """Largest cosine of each row of a with a row of b, and which; without b, with another row of a."""
    if block < 1:
        raise InterpError(f"block={block} must be at least 1")
    others = F.normalize(a.float() if b is None else b.float(), dim=1)
    if len(others) < (2 if b is None else 1):
        raise InterpError(f"{len(others)} rows leave nothing to compare with")
    best, which = [], []
    for start in range(0, len(a), block):
        mine = F.normalize(a[start : start + block].float(), dim=1)
        cosines = mine @ others.T
        if b is None:
            cosines[torch.arange(len(mine)), torch.arange(start, start + len(mine))] = -2.0
        found = cosines.max(1)
        best.append(found.values)
        which.append(found.indices)
    return torch.cat(best), torch.cat(which)


@dataclass(frozen=True, kw_only=True, eq=False)
class Geometry:
    """Cosines per latent; encoder entries are None for a dictionary without an encoder matrix of the same width."""

    decoder: Float[Tensor, "d_dict"]
    neighbour: Int[Tensor, "d_dict"]
    """Latent whose decoder row is nearest."""
    encoder: Float[Tensor, "d_dict"] | None
    aligned: Float[Tensor, "d_dict"] | None
    """cos(e_i, d_i)"""
    chance: float
    """decoder_max_cosine of random rows."""
    aligned_chance: float
    """Mean |cos| of two random directions, sqrt(2 / (pi d)) for large d."""

    def summary(self) -> dict[str, float | None]:
        """The metrics by name."""
        return {
            "decoder_max_cosine": float(self.decoder.mean()),
            "encoder_max_cosine": None if self.encoder is None else float(self.encoder.mean()),
            "encoder_decoder": None if self.aligned is None else float(self.aligned.mean()),
            "near_copies": share(self.decoder > NEAR),
        }


@torch.no_grad()
def geometry(dictionary: Dictionary, *, block: int = BLOCK, seed: int = 0) -> Geometry:
    """Cosine structure of a dictionary with at least two latents."""
    features = dictionary.features
    decoder, neighbour = nearest_rows(features, block=block)
    drawn = torch.randn(features.shape, generator=torch_generator(seed, "geometry-chance")).to(features.device)
    W_enc = getattr(dictionary, "W_enc", None)
    encoder = aligned = None
    if isinstance(W_enc, Tensor) and W_enc.ndim == 2 and W_enc.shape[1] == len(features):
        encoder = nearest_rows(W_enc.detach().T, block=block)[0]
        if W_enc.shape[0] == features.shape[1]:
            aligned = F.cosine_similarity(W_enc.detach().T.float(), features.float(), dim=1)
    return Geometry(
        decoder=decoder,
        neighbour=neighbour,
        encoder=encoder,
        aligned=aligned,
        chance=float(nearest_rows(drawn, block=block)[0].mean()),
        aligned_chance=(2 / (torch.pi * features.shape[1])) ** 0.5,
    )
