"""What a trained dictionary has to beat: PCA with as many components as it has active latents, a random dictionary,
and ablation.

PCA-k reconstructs with the k leading principal components of the training activations: the best that any k fixed
directions can do. The random dictionary is the autoencoder before training (unit rows, tied encoder, same k), with
its bias at the mean and one gain fitted by least squares on the training activations, so that it loses by its
directions and not by its size. Zero ablation is the reference point of loss_recovered. `shuffled_dims` destroys what
a dictionary could find, keeping every coordinate's distribution: train on it, and see what is left.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import InterpError
from interp.core.seed import torch_generator
from interp.dictionaries.activations.topk import TopK
from interp.dictionaries.base import check_width
from interp.dictionaries.codes import SparseCodes
from interp.dictionaries.dictionary import SparseDictionary


@dataclass(frozen=True, eq=False)
class PCADictionary:
    """x_hat = mean + ((x - mean) C^T) C with orthonormal rows C; every component is active at every token."""

    mean: Float[Tensor, "d"]
    components: Float[Tensor, "k d"]

    @property
    def d_in(self) -> int:
        return self.components.shape[1]

    @property
    def d_dict(self) -> int:
        return self.components.shape[0]

    @property
    def features(self) -> Float[Tensor, "k d"]:
        return self.components

    def encode(self, x: Float[Tensor, "*batch d"]) -> SparseCodes:
        check_width(x, self.d_in)
        values = (x - self.mean) @ self.components.T
        indices = torch.arange(self.d_dict, device=x.device).expand(values.shape)
        return SparseCodes(values, indices, self.d_dict)

    def decode(self, codes: SparseCodes) -> Float[Tensor, "*batch d"]:
        return codes.values @ self.components + self.mean


@dataclass(frozen=True, eq=False)
class ZeroDictionary:
    """x_hat = fill, whatever x is: zero ablation with fill 0, the mean predictor with fill = mean."""

    fill: Float[Tensor, "d"]

    @property
    def d_in(self) -> int:
        return self.fill.shape[0]

    @property
    def d_dict(self) -> int:
        return 0

    @property
    def features(self) -> Float[Tensor, "0 d"]:
        return self.fill.new_zeros(0, self.d_in)

    def encode(self, x: Float[Tensor, "*batch d"]) -> SparseCodes:
        check_width(x, self.d_in)
        empty = x.new_zeros(*x.shape[:-1], 0)
        return SparseCodes(empty, empty.long(), 0)

    def decode(self, codes: SparseCodes) -> Float[Tensor, "*batch d"]:
        return self.fill.expand(*codes.values.shape[:-1], self.d_in)


@dataclass(frozen=True, eq=False)
class IdentityDictionary:
    """Features +e_i and -e_i, codes the positive and the negative part of x: reconstructs exactly, without sparsity."""

    d: int

    @property
    def d_in(self) -> int:
        return self.d

    @property
    def d_dict(self) -> int:
        return 2 * self.d

    @property
    def features(self) -> Float[Tensor, "d_dict d"]:
        return torch.cat([torch.eye(self.d), -torch.eye(self.d)])

    def encode(self, x: Float[Tensor, "*batch d"]) -> SparseCodes:
        check_width(x, self.d)
        axis = torch.arange(self.d, device=x.device)
        return SparseCodes(x.abs(), torch.where(x < 0, axis + self.d, axis), self.d_dict)

    def decode(self, codes: SparseCodes) -> Float[Tensor, "*batch d"]:
        dense = codes.dense()
        return dense[..., : self.d] - dense[..., self.d :]


@torch.no_grad()
def shuffled_dims(x: Float[Tensor, "n d"], *, seed: int) -> Float[Tensor, "n d"]:
    """Every coordinate shuffled over the tokens by an order of its own: same marginals, no structure between them."""
    generator = torch_generator(seed, "shuffled-dims")
    shuffled = torch.empty_like(x)
    for i in range(x.shape[1]):
        shuffled[:, i] = x[torch.randperm(len(x), generator=generator).to(x.device), i]
    return shuffled


@torch.no_grad()
def fit_pca(x: Float[Tensor, "n d"], k: int) -> PCADictionary:
    """The k leading principal components, from the covariance in float64; sign: largest entry positive."""
    if not 1 <= k <= x.shape[1]:
        raise InterpError(f"k={k} principal components of {x.shape[1]}-dimensional activations; choose 1..{x.shape[1]}")
    if len(x) < 2:
        raise InterpError(f"PCA needs at least 2 activations, got {len(x)}")
    mean = x.double().mean(0)
    covariance = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for block in x.split(8192):
        centred = block.double() - mean
        covariance.addmm_(centred.T, centred)
    vectors = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :k].T
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return PCADictionary(mean.to(x.dtype), (vectors * largest.sign()).to(x.dtype).contiguous())


@torch.no_grad()
def random_dictionary(x: Float[Tensor, "n d"], d_dict: int, k: int, *, seed: int) -> SparseDictionary:
    """Untrained top-k dictionary around the mean of x, with the gain <x - mean, y> / <y, y> of its output y."""
    sae = SparseDictionary.random(x.shape[1], d_dict, TopK(k), seed=seed, dtype=x.dtype).to(x.device)
    mean = x.double().mean(0).to(x.dtype)
    sae.b_dec.copy_(mean)
    along, power = 0.0, 0.0
    for block in x.split(4096):
        output = sae(block) - mean
        along += float(((block - mean) * output).sum(dtype=torch.float64))
        power += float(output.square().sum(dtype=torch.float64))
    if power > 0:
        sae.W_dec.mul_(along / power)
    return sae
