"""Directions from contrast pairs: where in the stream does a behaviour point, and is the answer reliable?

With d_i = a+_i - a-_i, the difference of the activations of a pair at the read position (last token):
mean   v = mean_i d_i                                                        (CAA, ActAdd)
pca    first right singular vector of [d; -d], UNcentred, signed by the mean and rescaled to its norm (RepE)
Papers: Rimsky et al. 2024, arxiv.org/abs/2312.06681; Zou et al. 2023, arxiv.org/abs/2310.01405.
Beware: centring differences of one sign removes what is looked for and leaves noise.
Axes: pair, layer, d (residual coordinate).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from interp.core.errors import InterpError, unknown
from interp.core.seed import torch_generator
from interp.instrument.capture import capture
from interp.instrument.tokens import adds_start, tokenize
from interp.models.model import LoadedModel

METHODS = ("mean", "pca")
ROWS = 40
"""Texts per forward while reading activations."""


def read_last(model: LoadedModel, texts: Sequence[str], layers: Sequence[int]) -> Float[Tensor, "layer text d_model"]:
    """The stream after each of some blocks, at the last token of each text; float32 on the cpu.

    Texts get the start token that the tokenizer puts before a text, if it does, and nothing else.
    """
    names = [f"resid_post.{layer}" for layer in layers]
    parts: list[Tensor] = []
    for start in range(0, len(texts), ROWS):
        record = tokenize(model, list(texts[start : start + ROWS]), pad="right", add_special=adds_start(model))
        with capture(model, names, positions=record.last) as acts:
            model(record)
        parts.append(torch.stack([acts[name][:, 0].float().cpu() for name in names]))
    return torch.cat(parts, dim=1)


def direction(differences: Float[Tensor, "pair d"], method: str = "mean") -> Float[Tensor, " d"]:
    """The direction of a set of differences, with the length of their mean."""
    mean = differences.mean(dim=0)
    if not bool(mean.norm() > 0):
        raise InterpError("the mean difference is zero: the two sides of the pairs have equal activations")
    if method == "mean":
        return mean
    if method == "pca":
        both = torch.cat([differences, -differences])
        first = torch.linalg.svd(both, full_matrices=False).Vh[0]
        return first * torch.sign(first @ mean) * mean.norm()
    raise unknown("method", method, METHODS)


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """How much a direction can be trusted before it is used."""

    split_half: float
    """Mean cosine between the directions of random halves of the pairs."""
    agreement: float
    """Mean cosine between single differences and the direction; high values predict that steering works."""
    separation: float
    """Gap of the two sides along the direction over their pooled standard deviation (d')."""
    pca_share: float
    """Share of the first component in the sum of squares of the differences."""
    cosine_to_pca: float


def reliability(
    positive: Float[Tensor, "pair d"], negative: Float[Tensor, "pair d"], *, method: str = "mean", seed: int = 0
) -> Reliability:
    """Reliability of the direction between two sides of the same pairs."""
    differences = positive - negative
    along = normalize(direction(differences, method), dim=0)
    high, low = positive @ along, negative @ along
    spread = ((high.var() + low.var()) / 2).sqrt()
    squares = torch.linalg.svdvals(differences).square()
    return Reliability(
        split_half=float(split_half_cosines(differences, method=method, seed=seed).mean()),
        agreement=float(cosine_similarity(differences, along[None]).mean()),
        separation=float((high.mean() - low.mean()) / spread.clamp_min(1e-12)),
        pca_share=float(squares[0] / squares.sum()),
        cosine_to_pca=float(cosine_similarity(along, direction(differences, "pca"), dim=0)),
    )


def split_half_cosines(
    differences: Float[Tensor, "pair d"], *, method: str = "mean", n_splits: int = 20, seed: int = 0
) -> Float[Tensor, " split"]:
    """Cosine between the directions of the two halves of the pairs, over random splits."""
    n = len(differences)
    if n < 4:
        raise InterpError(f"{n} pairs cannot be split into halves of two; give at least 4")
    generator = torch_generator(seed, "split-half")
    found: list[Tensor] = []
    for _ in range(n_splits):
        order = torch.randperm(n, generator=generator)
        first, second = differences[order[: n // 2]], differences[order[n // 2 :]]
        found.append(cosine_similarity(direction(first, method), direction(second, method), dim=0))
    return torch.stack(found)


def random_directions(n: int, d: int, *, seed: int) -> Float[Tensor, "n d"]:
    """Unit vectors, uniform on the sphere: the control that steering papers owe."""
    return normalize(torch.randn(n, d, generator=torch_generator(seed, "random directions")), dim=1)


def random_signs(n: int, n_pairs: int, *, seed: int) -> Float[Tensor, "n pair"]:
    """Rows of +1 and -1, half of each (the odd one at random), so that no row favours a side."""
    generator = torch_generator(seed, "shuffled signs")
    signs = torch.ones(n, n_pairs)
    for row in signs:
        order = torch.randperm(n_pairs, generator=generator)
        row[order[: n_pairs // 2]] = -1.0
    return signs


def shuffled_directions(
    differences: Float[Tensor, "pair d"], n: int, *, method: str = "mean", seed: int
) -> Float[Tensor, "n d"]:
    """Unit directions from the same pairs with half of their labels exchanged: same activations, no behaviour."""
    signs = random_signs(n, len(differences), seed=seed)
    return normalize(torch.stack([direction(row[:, None] * differences, method) for row in signs]), dim=1)
