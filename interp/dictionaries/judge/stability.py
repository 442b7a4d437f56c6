"""Do two seeds find the same features?

Decoder rows of two dictionaries are paired one to one so that the sum of cosines is largest (Hungarian method).

stability        mean cosine of the pairs
shared           share of pairs at a cosine above .7
Chance: random directions in place of the second dictionary, matched in the same way.
Source: G. Paulo & N. Belrose 2025, https://arxiv.org/abs/2501.16615 (their threshold .7; of 131,000 latents about 30 %
were shared by two seeds). Beware: the matching of n rows costs n^3; above `max_rows` the rows of the first dictionary
are a random subset, which meets less competition for partners: the number is then an upper bound, and says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from interp.core.errors import InterpError
from interp.core.seed import torch_generator
from interp.dictionaries.judge.planted import matching

METRICS = {
    "stability": "v1: mean cosine of decoder rows of two seeds, matched one to one with the largest sum",
    "shared": "v1: share of those pairs at a cosine above .7",
}
SHARED = 0.7
MAX_ROWS = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class Agreement:
    """Cosines of matched features of two dictionaries."""

    cosines: Float[Tensor, "pairs"]
    chance: Float[Tensor, "pairs"]
    """The same with random directions in place of the second."""
    upper_bound: bool
    """Only a subset of the first dictionary's features was matched."""

    @property
    def stability(self) -> float:
        return float(self.cosines.mean())

    @property
    def stability_chance(self) -> float:
        return float(self.chance.mean())

    @property
    def shared(self) -> float:
        return float((self.cosines > SHARED).double().mean())


@torch.no_grad()
def agreement(
    a: Float[Tensor, "n d"], b: Float[Tensor, "m e"], *, max_rows: int = MAX_ROWS, seed: int = 0
) -> Agreement:
    """Match the features of two dictionaries; symmetric where neither is cut to `max_rows`."""
    if a.shape[1] != b.shape[1]:
        raise InterpError(f"features of widths {a.shape[1]} and {b.shape[1]} cannot be matched")
    if min(len(a), len(b)) < 1 or max_rows < 1:
        raise InterpError(f"nothing to match: {len(a)} and {len(b)} features, max_rows={max_rows}")
    if len(a) > max_rows:
        chosen = torch.randperm(len(a), generator=torch_generator(seed, "agreement-rows"))[:max_rows]
        mine = a[chosen.to(a.device)]
    else:
        mine = a
    drawn = torch.randn(b.shape, generator=torch_generator(seed, "agreement-chance")).to(b.device)
    unit = F.normalize(mine.float(), dim=1)
    return Agreement(
        cosines=matching(unit @ F.normalize(b.float(), dim=1).T),
        chance=matching(unit @ F.normalize(drawn, dim=1).T),
        upper_bound=len(mine) < len(a),
    )
