"""What a transcoder has to beat: the best linear map, and random features with the best readout.

    linear map        y_hat = x W + b by ridge regression: what the MLP does without any feature
    random features   the encoder before training (random unit directions, centred, top-k), decoder and bias by ridge
                      regression of y on its codes: equal size and L0, the readout as good as can be, nothing learned
A transcoder that does not beat the second has learned no features; one that does not beat the first explains less than
the linear part of its MLP.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from interp.core.errors import InterpError
from interp.core.seed import torch_generator
from interp.dictionaries.activations.topk import TopK
from interp.dictionaries.base import check_width
from interp.dictionaries.codes import SparseCodes
from interp.dictionaries.dictionary import SparseDictionary

BLOCK = 4096
"""Tokens encoded at once."""


@dataclass(frozen=True, eq=False)
class LinearMap:
    """y_hat = x W + b; a dictionary without latents."""

    W: Float[Tensor, "d_in d_out"]
    b: Float[Tensor, "d_out"]

    @property
    def d_in(self) -> int:
        return self.W.shape[0]

    @property
    def d_dict(self) -> int:
        return 0

    @property
    def features(self) -> Float[Tensor, "0 d_out"]:
        return self.W.new_zeros(0, self.W.shape[1])

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> SparseCodes:
        check_width(x, self.d_in)
        empty = x.new_zeros(*x.shape[:-1], 0)
        return SparseCodes(empty, empty.long(), 0, offset=x @ self.W + self.b)

    def decode(self, codes: SparseCodes) -> Float[Tensor, "*batch d_out"]:
        if codes.offset is None:
            raise InterpError("these codes are not those of a linear map: they hold no offset")
        return codes.offset


@torch.no_grad()
def linear_map(x: Float[Tensor, "n d_in"], y: Float[Tensor, "n d_out"], *, ridge: float = 1e-2) -> LinearMap:
    """The ridge regression y = x W + b, in float64; `ridge` is relative to the mean variance of x."""
    if len(x) != len(y) or len(x) < 2:
        raise InterpError(f"a linear map needs at least 2 pairs, got {len(x)} inputs and {len(y)} targets")
    mean_x, mean_y = x.double().mean(0), y.double().mean(0)
    gram = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    cross = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, device=x.device)
    for part, target in zip(x.split(BLOCK), y.split(BLOCK), strict=True):
        centred = part.double() - mean_x
        gram.addmm_(centred.T, centred)
        cross.addmm_(centred.T, target.double() - mean_y)
    gram.diagonal().add_(ridge * gram.diagonal().mean().clamp_min(1e-300))
    weights = torch.cholesky_solve(cross, torch.linalg.cholesky(gram))
    return LinearMap(weights.to(x.dtype), (mean_y - mean_x @ weights).to(x.dtype))


@torch.no_grad()
def random_features(
    x: Float[Tensor, "n d_in"], y: Float[Tensor, "n d_out"], d_dict: int, k: int, *, seed: int, ridge: float = 1e-2
) -> SparseDictionary:
    """A transcoder whose encoder is random and whose decoder is fitted on x, y; `ridge` is relative to a mean latent.

    Sums over tokens run over pairs of active latents alone, k^2 per token.
    """
    if len(x) != len(y) or len(x) < 2:
        raise InterpError(f"random features need at least 2 pairs, got {len(x)} inputs and {len(y)} targets")
    made = SparseDictionary(x.shape[1], d_dict, TopK(k), d_out=y.shape[1], dtype=x.dtype).to(x.device)
    generator = torch_generator(seed, "random-features", *made.W_enc.shape)
    made.W_enc.copy_(F.normalize(torch.randn(d_dict, made.d_in, generator=generator, dtype=torch.float64), dim=1).T)
    made.b_enc.copy_(-x.double().mean(0).to(x.dtype) @ made.W_enc)
    gram = torch.zeros(d_dict * d_dict, dtype=torch.float64, device=x.device)
    cross = torch.zeros(d_dict, y.shape[1], dtype=torch.float64, device=x.device)
    total = torch.zeros(d_dict, dtype=torch.float64, device=x.device)
    for part, target in zip(x.split(BLOCK), y.split(BLOCK), strict=True):
        codes = made.encode(part)
        f, i = codes.values.double(), codes.indices.long()
        gram.index_add_(
            0, (i[:, :, None] * d_dict + i[:, None, :]).flatten(), (f[:, :, None] * f[:, None, :]).flatten()
        )
        cross += codes.coo().double().t() @ target.double()
        total.index_add_(0, i.flatten(), f.flatten())
    mean_f, mean_y = total / len(x), y.double().mean(0)
    centred = gram.view(d_dict, d_dict) - len(x) * mean_f[:, None] * mean_f
    centred.diagonal().add_(ridge * centred.diagonal().mean().clamp_min(1e-300))
    decoder = torch.cholesky_solve(cross - len(x) * mean_f[:, None] * mean_y, torch.linalg.cholesky(centred))
    made.W_dec.copy_(decoder)
    made.b_dec.copy_(mean_y - mean_f @ decoder)
    return made.requires_grad_(False)
