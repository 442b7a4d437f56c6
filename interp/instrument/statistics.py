"""Statistics of the rows of one site, gathered as they stream by and merged exactly.

Per coordinate: mean, variance and the third and fourth central sums; per row: Euclidean norms; over all: the largest
magnitude and the token it came from. Float64 throughout. Two sets of rows A, B with n = n_A + n_B and
delta = mean_B - mean_A merge as

    mean = mean_A + delta n_B / n,        M2 = M2_A + M2_B + delta^2 n_A n_B / n,     M3 and M4 alike

Source: Chan, Golub, LeVeque 1979 (M2); Pebay 2008, Sandia SAND2008-6212, eq. 2.1 (M3, M4).
Traps: `variance` divides by n. `kurtosis` is M4 n / M2^2, which is 3 for a normal distribution (not the excess), and
leaves out coordinates that never move. Quantiles of the norm come from a histogram with 16 bins to the octave: they
are within 2.3 % (2^(1/32)) of a norm that really has this rank; count, mean and maximum are exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from interp.core.errors import InterpError

BINS_PER_OCTAVE, LOWEST, HIGHEST = 16, -40, 40
"""Norms from 2^-40 to 2^40; the first and the last bin take what lies beyond (and zero)."""
N_BINS = BINS_PER_OCTAVE * (HIGHEST - LOWEST)
BLOCK_NUMBERS = 1 << 17
"""Numbers handled at once: a block and its copies in float64 stay in the processor's cache."""
PARTS = ("moments", "numbers", "token", "histogram")


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistics:
    """What was seen of one site. Rows are flattened: d is the number of coordinates of a token."""

    count: int
    mean: Float64[Tensor, " d"]
    m2: Float64[Tensor, " d"]
    """Sum of squared distances from the mean."""
    m3: Float64[Tensor, " d"]
    m4: Float64[Tensor, " d"]
    norm_sum: float
    norm_max: float
    histogram: Int[Tensor, " bins"]
    """How many norms fell between 2^(i/16 - 40) and 2^((i+1)/16 - 40)."""
    top: float
    """The value of largest magnitude, with its sign."""
    top_token: tuple[int, int, int, int]
    """Its row, position, token id (-1 where there are no tokens) and coordinate; the first where several tie."""

    @classmethod
    def empty(cls, d: int) -> Statistics:
        zeros = torch.zeros(d, dtype=torch.float64)
        return cls(
            count=0, mean=zeros, m2=zeros, m3=zeros, m4=zeros, norm_sum=0.0, norm_max=0.0,
            histogram=torch.zeros(N_BINS, dtype=torch.int64), top=0.0, top_token=(-1, -1, -1, -1),
        )  # fmt: skip

    @classmethod
    def of(cls, values: Float[Tensor, "n *shape"], tokens: Sequence[Int[Tensor, " n"] | None]) -> Statistics:
        """Statistics of some rows; `tokens` are their row, position and id (None where there is none)."""
        flat = values.flatten(1) if values.ndim > 1 else values[:, None]
        found, start, winner = cls.empty(flat.shape[1]), 0, 0
        if flat.numel() == 0:
            return found
        for rows in flat.split(max(1, BLOCK_NUMBERS // flat.shape[1])):
            block = _block(rows)
            winner = start if abs(block.top) > abs(found.top) else winner
            found, start = found.merge(block), start + len(rows)
        return found._located(flat, winner, tokens)

    def _located(self, flat: Tensor, start: int, tokens: Sequence[Tensor | None]) -> Statistics:
        """The same with the place of the largest value, which lies in the block that begins at `start`."""
        block = flat[start : start + max(1, BLOCK_NUMBERS // flat.shape[1])]
        place = int((block.abs() == abs(self.top)).flatten().int().argmax())
        at, dim = start + place // flat.shape[1], place % flat.shape[1]
        row, pos, token = (-1 if column is None else int(column[at]) for column in tokens)
        return replace(self, top=float(flat[at, dim]), top_token=(row, pos, token, dim))

    def merge(self, other: Statistics) -> Statistics:
        """Statistics of both sets of rows. The order of merging changes the last bits only."""
        if self.mean.shape != other.mean.shape:
            raise InterpError(f"statistics of {len(self.mean)} and {len(other.mean)} coordinates do not merge")
        if self.count == 0 or other.count == 0:
            return other if self.count == 0 else self
        a, b, n = float(self.count), float(other.count), float(self.count + other.count)
        delta = other.mean - self.mean
        first = abs(self.top) >= abs(other.top)
        return Statistics(
            count=self.count + other.count,
            mean=self.mean + delta * (b / n),
            m2=self.m2 + other.m2 + delta**2 * (a * b / n),
            m3=self.m3 + other.m3 + delta**3 * (a * b * (a - b) / n**2)
            + delta * (a * other.m2 - b * self.m2) * (3 / n),
            m4=self.m4 + other.m4 + delta**4 * (a * b * (a * a - a * b + b * b) / n**3)
            + delta**2 * (a * a * other.m2 + b * b * self.m2) * (6 / n**2)
            + delta * (a * other.m3 - b * self.m3) * (4 / n),
            norm_sum=self.norm_sum + other.norm_sum,
            norm_max=max(self.norm_max, other.norm_max),
            histogram=self.histogram + other.histogram,
            top=self.top if first else other.top,
            top_token=self.top_token if first else other.top_token,
        )  # fmt: skip

    def moved(self, rows: int) -> Statistics:
        """The same where row numbers are higher by `rows`."""
        row, *rest = self.top_token
        return self if rows == 0 or row < 0 else replace(self, top_token=(row + rows, *rest))

    @property
    def variance(self) -> Float64[Tensor, " d"]:
        """Diagonal of the covariance, divided by n."""
        return self.m2 / max(1, self.count)

    @property
    def kurtosis(self) -> float:
        """Mean over the coordinates that move of M4 n / M2^2; 3 for a normal distribution, nan if none moves."""
        moving = self.m2 > 0
        return float((self.m4[moving] * self.count / self.m2[moving] ** 2).mean())

    @property
    def norm_mean(self) -> float:
        return self.norm_sum / max(1, self.count)

    def norm_quantile(self, q: float) -> float:
        """The norm below which a share `q` of the rows lies, from the histogram; 0.5 is the median."""
        if not 0 <= q <= 1 or self.count == 0:
            raise InterpError(f"a quantile needs rows and a share from 0 to 1, got {q} of {self.count} rows")
        rank = min(int(q * self.count), self.count - 1)
        bin_ = int((self.histogram.cumsum(0) > rank).int().argmax())
        return min(2.0 ** ((bin_ + 0.5) / BINS_PER_OCTAVE + LOWEST) if bin_ else 0.0, self.norm_max)

    def tensors(self) -> dict[str, Tensor]:
        """For a safetensors file; `from_tensors` reads it back exactly."""
        return {
            "moments": torch.stack([self.mean, self.m2, self.m3, self.m4]),
            "numbers": torch.tensor([self.norm_sum, self.norm_max, self.top], dtype=torch.float64),
            "token": torch.tensor([self.count, *self.top_token]),
            "histogram": self.histogram,
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Statistics:
        mean, m2, m3, m4 = tensors["moments"].unbind(0)
        norm_sum, norm_max, top = tensors["numbers"].tolist()
        count, row, pos, token, dim = tensors["token"].tolist()
        return cls(
            count=count, mean=mean, m2=m2, m3=m3, m4=m4, norm_sum=norm_sum, norm_max=norm_max,
            histogram=tensors["histogram"], top=top, top_token=(row, pos, token, dim),
        )  # fmt: skip

    def summary(self) -> dict[str, object]:
        """The numbers a person reads first."""
        row, pos, token, dim = self.top_token
        return {
            "count": self.count,
            "norm": {
                "mean": self.norm_mean,
                "max": self.norm_max,
                **({"about_median": self.norm_quantile(0.5)} if self.count else {}),
            },
            "std": float(self.variance.mean().sqrt()),
            "kurtosis": None if not bool((self.m2 > 0).any()) else self.kurtosis,
            "top": {"value": self.top, "row": row, "pos": pos, "id": token, "dim": dim},
        }


def _block(block: Tensor) -> Statistics:
    """One block, held in float64 once; where its largest value lies is left open."""
    x = block.to(device="cpu", dtype=torch.float64, copy=True)
    ones = torch.ones(len(x), dtype=torch.float64)
    norms = torch.linalg.vector_norm(x, dim=1)
    least, most = (float(v) for v in torch.aminmax(x))
    if not math.isfinite(least + most):
        raise InterpError("statistics are of finite numbers; these hold NaN or infinity")
    bins = ((norms.log2() - LOWEST) * BINS_PER_OCTAVE).clamp(0, N_BINS - 1).long()
    mean = (ones @ x) / len(x)
    x.sub_(mean)
    square = x * x
    return Statistics(
        count=len(x),
        mean=mean,
        m2=ones @ square,
        m3=ones @ x.mul_(square),
        m4=ones @ square.square_(),
        norm_sum=float(norms.sum()),
        norm_max=float(norms.max()),
        histogram=torch.bincount(bins, minlength=N_BINS),
        top=most if abs(most) >= abs(least) else least,
        top_token=(-1, -1, -1, -1),
    )
