"""Which way round do the two matrices of a bare file lie?

The biases give the widths: m = len(b_enc), d_out = len(b_dec). W_enc is (d_in, m) here and (m, d_in) in some files,
W_dec (m, d_out) here and (d_out, m) as the weight of a linear layer. Where m differs from the other width the shape
decides. Where it does not, only data can: of the orientations that are left the one is taken that reconstructs a
sample with the least FVU, if it is clearly the least.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import ArtefactError
from interp.dictionaries.base import Dictionary, rows
from interp.dictionaries.metrics import Moments

CLEARLY = 0.9
"""The best orientation must have less than this share of the FVU of the next."""
BLOCK = 1024

Turned = tuple[bool, bool]
"""Whether the encoder, and whether the decoder, lies the other way round."""


def possible(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, path: Path) -> list[Turned]:
    """Orientations that fit the biases; one, unless a matrix is square. Raises ArtefactError where none fits."""
    m, d_out = len(b_enc), len(b_dec)
    encoder = [turned for turned, width in ((False, W_enc.shape[1]), (True, W_enc.shape[0])) if width == m]
    decoder = [turned for turned in (False, True) if tuple(W_dec.mT.shape if turned else W_dec.shape) == (m, d_out)]
    if not encoder or not decoder:
        raise ArtefactError(
            f"{path}: W_enc {tuple(W_enc.shape)} and W_dec {tuple(W_dec.shape)} do not fit {m} latents (b_enc) and "
            f"width {d_out} (b_dec)"
        )
    return list(product(encoder, decoder))


@torch.no_grad()
def fvu(dictionary: Dictionary, x: Float[Tensor, "n d_in"], y: Float[Tensor, "n d_out"] | None = None) -> float:
    """Fraction of variance unexplained on a sample."""
    moments = Moments()
    targets = x if y is None else y
    for block, target in zip(rows(x, BLOCK), rows(targets, BLOCK), strict=True):
        moments.update(target, dictionary.decode(dictionary.encode(block)))
    return moments.fvu


def choose(
    turned: list[Turned],
    build: Callable[[Turned], Dictionary],
    path: Path,
    x: Float[Tensor, "n d_in"] | None,
    y: Float[Tensor, "n d_out"] | None = None,
) -> Turned:
    """The orientation that reconstructs the sample; ArtefactError where there is no sample, or no clear answer."""
    if len(turned) == 1:
        return turned[0]
    if x is None:
        raise ArtefactError(
            f"{path} has as many latents as dimensions, so its shapes do not say which way the weights lie; pass "
            "turned=(encoder, decoder), or sample= with activations to find out"
        )
    found = sorted((fvu(build(way), x, y), way) for way in turned)
    if found[0][0] >= CLEARLY * found[1][0]:
        listed = ", ".join(f"turned={way}: FVU {value:.3f}" for value, way in found)
        raise ArtefactError(f"no orientation of {path} reconstructs the sample clearly better than others: {listed}")
    return found[0][1]
