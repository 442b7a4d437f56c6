"""How are the codes used, and where?

usage       how often each code is chosen, counted over the k choices of every token
perplexity  exp(entropy of that distribution), per group: n_codes where all are used alike, 1 where one is
dead        share of codes that are chosen at none of the tokens looked at (the number of tokens matters)
contexts    tokens of other text at which a code is chosen, drawn at random: a code has no degree, so there is no
            "most active" example, and chosen examples would say little
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import InterpError
from interp.core.seed import torch_generator
from interp.dictionaries.base import rows
from interp.dictionaries.codebook import Codebook
from interp.dictionaries.heldout import BLOCK
from interp.instrument.tokens import TokenRecord

METRICS = {
    "perplexity": "v1: exp of the entropy of code usage over all choices of the evaluated tokens, mean over groups",
    "dead_fraction": "v1: share of codes chosen at no evaluated token",
}
MIN_FIRINGS = 3
"""Codes chosen at fewer tokens are not shown in contexts."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Usage:
    """How often each code is chosen."""

    counts: Int[Tensor, "group code"]
    n_tokens: int

    @property
    def share(self) -> Float[Tensor, "group code"]:
        """Of the choices of a group; sums to 1."""
        return self.counts.double() / self.counts.sum(1, keepdim=True).clamp_min(1)

    @property
    def perplexity(self) -> Float[Tensor, " group"]:
        return torch.exp(-torch.xlogy(self.share, self.share).sum(1))

    @property
    def dead_fraction(self) -> float:
        return float((self.counts == 0).double().mean())

    def ranked(self) -> pd.DataFrame:
        """Share of choices by rank, mean over groups, with the uniform share beside it."""
        share = self.share.sort(dim=1, descending=True).values.mean(0).cpu().numpy()
        n_codes = len(share)
        at = np.unique(np.geomspace(1, n_codes, num=min(n_codes, 60)).round().astype(int))
        at = at[share[at - 1] > 0]
        parts = [
            pd.DataFrame({"series": "codes", "rank": at, "share": share[at - 1]}),
            pd.DataFrame({"series": "uniform", "rank": [1, n_codes], "share": [1 / n_codes] * 2}),
        ]
        return pd.concat(parts, ignore_index=True)


@torch.no_grad()
def chosen_latents(codebook: Codebook, x: Float[Tensor, "n d_in"]) -> Int[Tensor, "n slot"]:
    """Latents of every token, encoded in blocks, on the cpu."""
    parts = [codebook.encode(block).indices.cpu() for block in rows(x, BLOCK)]
    if not parts:
        raise InterpError("there are no activations to encode")
    return torch.cat(parts)


def usage(latents: Int[Tensor, "n slot"], codebook: Codebook) -> Usage:
    """Usage over the tokens given."""
    counts = torch.bincount(latents.reshape(-1), minlength=codebook.d_dict)
    return Usage(counts=counts.reshape(codebook.n_groups, codebook.n_codes), n_tokens=len(latents))


def contexts(
    latents: Int[Tensor, "n slot"],
    record: TokenRecord,
    keep: Bool[Tensor, "batch pos"],
    *,
    latent_list: list[int] | None = None,
    n_latents: int = 20,
    n_examples: int = 5,
    window: int = 6,
    seed: int = 0,
) -> pd.DataFrame:
    """One row per example of a code; `latents` are those of the tokens that `keep` marks, in order."""
    where = keep.nonzero()
    if len(where) != len(latents):
        raise InterpError(f"{len(latents)} encoded tokens for {len(where)} kept ones; encode the tokens of this record")
    generator = torch_generator(seed, "codebook-contexts")
    counts = torch.bincount(latents.reshape(-1))
    if latent_list is None:
        live = (counts >= MIN_FIRINGS).nonzero()[:, 0]
        latent_list = live[torch.randperm(len(live), generator=generator)[:n_latents]].sort().values.tolist()
    found: list[tuple[object, ...]] = []
    for latent in latent_list:
        token = (latents == latent).any(1).nonzero()[:, 0]
        share = len(token) / len(latents)
        order = torch.randperm(len(token), generator=generator)[:n_examples]
        for sequence, pos in where[token[order]].tolist():
            text = record.strings[sequence]
            before, after = "".join(text[max(0, pos - window) : pos]), "".join(text[pos + 1 : pos + 1 + window])
            found.append((latent, share, before, text[pos], after, sequence, pos))
    return pd.DataFrame(found, columns=["latent", "density", "before", "token", "after", "sequence", "pos"])
