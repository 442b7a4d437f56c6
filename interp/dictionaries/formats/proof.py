"""Do two dictionaries compute the same? Codes and reconstructions of the same inputs, side by side.

error      max over tokens of |y_a - y_b| / (root mean square of |y_a|), over tokens at which the same latents fire
code_error the same for the codes
switched   share of tokens at which other latents fire: a pre-activation within rounding of its threshold, or of the
           k-th largest, may fall on either side, and such a token says nothing about the rest
Weights are compared in float64, so that the storage type does not matter; against another library in float32.
Equal: error and code_error at most `TOLERANCE`, switched at most `SWITCHED`, and some latent fires.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.seed import torch_generator
from interp.dictionaries.dictionary import SparseDictionary
from interp.dictionaries.formats.peers import Peer

TOLERANCE = 1e-5
"""Relative error of float32 weights that were folded: a few roundings of 6e-8, amplified by sums that cancel."""
PEER_TOLERANCE = 1e-3
"""Against arithmetic in float32, in another order."""
SWITCHED = 0.01
N_RANDOM = 256
SPREADS = (0.3, 1.0, 3.0, 10.0)
"""Sizes of random inputs, in units at which a typical pre-activation is as large as a typical threshold or bias."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two dictionaries on the same inputs."""

    n_tokens: int
    error: float
    code_error: float
    switched: float
    l0: float
    """Active latents per token of the first."""
    tolerance: float

    @property
    def equal(self) -> bool:
        return max(self.error, self.code_error) <= self.tolerance and self.switched <= SWITCHED and self.l0 > 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"equal": self.equal}


@torch.no_grad()
def compare(before: SparseDictionary, after: SparseDictionary, x: Float[Tensor, "n d_in"]) -> Comparison:
    """Both in float64."""
    outputs = [_run(dictionary.like().double(), x.double()) for dictionary in (before, after)]
    return compared(*outputs[0], *outputs[1], tolerance=TOLERANCE)


@torch.no_grad()
def compare_peer(before: SparseDictionary, theirs: Peer, x: Float[Tensor, "n d_in"]) -> Comparison:
    """A dictionary and another library's reading of it."""
    own = _run(before.like().double(), x.double())
    codes, out = theirs(x.float())
    return compared(*own, codes.double(), out.double(), tolerance=PEER_TOLERANCE)


def compared(
    codes: Float[Tensor, "n d_dict"],
    out: Float[Tensor, "n d_out"],
    other_codes: Float[Tensor, "n d_dict"],
    other_out: Float[Tensor, "n d_out"],
    *,
    tolerance: float,
) -> Comparison:
    """The numbers of a comparison."""
    same = ((codes != 0) == (other_codes != 0)).all(1)

    def error(a: Tensor, b: Tensor) -> float:
        size = float(a.square().sum(1).mean().sqrt())
        return float((a - b)[same].norm(dim=1).max()) / size if size and bool(same.any()) else 0.0

    return Comparison(
        n_tokens=len(codes), error=error(out, other_out), code_error=error(codes, other_codes),
        switched=1 - float(same.double().mean()), l0=float((codes != 0).double().sum(1).mean()), tolerance=tolerance,
    )  # fmt: skip


@torch.no_grad()
def random_inputs(dictionary: SparseDictionary, *, seed: int = 0) -> Float[Tensor, "n d_in"]:
    """Gaussian inputs of several sizes about the point that the encoder maps to its biases."""
    generator = torch_generator(seed, "formats-proof", dictionary.d_in, dictionary.d_dict)
    plain = dictionary.like().double()
    directions = torch.randn(N_RANDOM, plain.d_in, generator=generator, dtype=torch.float64)
    gain = float((plain.W_enc * plain.scale_in.reshape(-1, 1)).norm(dim=0).median().clamp_min(1e-12))
    threshold = getattr(plain.activation, "threshold", None)
    offset = plain.b_enc.abs() if threshold is None else plain.b_enc.abs() + threshold.double()
    unit = max(float(offset.median()), 1.0) / gain
    sizes = torch.tensor(SPREADS, dtype=torch.float64).repeat(N_RANDOM // len(SPREADS) + 1)[:N_RANDOM] * unit
    x = directions * sizes[:, None]
    return x + (plain.b_dec / plain.scale_in if plain.subtract_b_dec else 0)


def prove(
    before: SparseDictionary,
    after: SparseDictionary,
    back: SparseDictionary | None,
    theirs: Peer | None = None,
    real: Float[Tensor, "n d_in"] | None = None,
) -> Mapping[str, Any]:
    """Every comparison by name: there, back, and another library's reading, on random and on real inputs."""
    inputs = {"random": random_inputs(before)} | ({"real": real} if real is not None else {})
    found: dict[str, Any] = {}
    for name, x in inputs.items():
        found[f"there, {name}"] = compare(before, after, x).as_dict()
        if back is not None:
            found[f"and back, {name}"] = compare(before, back, x).as_dict()
        if theirs is not None:
            found[f"read by its library, {name}"] = compare_peer(before, theirs, x).as_dict()
    return {"equal": all(row["equal"] for row in found.values()), "comparisons": found}


def _run(dictionary: SparseDictionary, x: Tensor) -> tuple[Tensor, Tensor]:
    codes = dictionary.encode(x)
    return codes.dense(), dictionary.decode(codes)
