"""Without a judge that reads: is a latent a word detector, and does it say what comes next?

Offline substitutes; never call them autointerp scores.
    token_auc     how well firing is told by the token (and the one before it) alone: rates of firing are counted on
                  training text, tokens of test text are ranked by them, area under the ROC curve. 1: a lexical latent
    lens_lift     share of firings whose next token is among the 10 that the latent's row promotes most (see
                  `lens`), less that share at all tokens
Null of the first: firings permuted over the tokens (.5). Null of the second: the promoted tokens of another latent.
The trap both share: a model with random weights has lexical latents as well (T. Heap et al. 2025,
https://arxiv.org/abs/2501.17727), above all in its first layers; in SmolLM2-135M drawn anew an untrained dictionary has
token_auc .96 after block 0, .75 after 2 and .57 after 10. Hold token_auc against an untrained dictionary's. Early
layers do not write in the vocabulary's basis, so the lens says little far from the last ones.
Rates back off, pair to token to mean, with one pseudo-count each: (n_fired + rate_below) / (n + 1). Latents are drawn
at random among those that fire at least `MIN_FIRINGS` times in both halves; how many were too rare is reported.
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
from interp.dictionaries.base import Dictionary
from interp.dictionaries.heldout import HeldOut
from interp.dictionaries.judge.lens import promoted_tokens
from interp.models.model import LoadedModel

METRICS = {
    "token_auc": "v1: mean over sampled live latents of the AUC with which (previous token, token) predicts firing on "
    "other text; counts with back-off; 200 latents at most",
    "lens_lift": "v1: mean over the same latents of P(next token in its top 10 | fires) - P(next token in its top 10)",
}
MIN_FIRINGS = 5
N_LATENTS = 200


@dataclass(frozen=True, kw_only=True, eq=False)
class Firings:
    """Which sampled latents fire at which tokens of a text, with their neighbours."""

    fires: Bool[Tensor, "n latent"]
    token: Int[Tensor, "n"]
    before: Int[Tensor, "n"]
    """-1 where there is none."""
    after: Int[Tensor, "n"]
    """-1 where there is none."""


@torch.no_grad()
def firings(dictionary: Dictionary, data: HeldOut, latents: Int[Tensor, "latent"] | None = None) -> Firings:
    """Of some latents, or of all."""
    ids, mask = data.record.ids, data.record.mask
    before, after = torch.full_like(ids, -1), torch.full_like(ids, -1)
    before[:, 1:] = torch.where(mask[:, :-1], ids[:, :-1], -1)
    after[:, :-1] = torch.where(mask[:, 1:], ids[:, 1:], -1)
    parts: list[Tensor] = []
    for row in range(len(ids)):
        dense = dictionary.encode(data.x[row][data.keep[row].to(data.x.device)]).dense().cpu() != 0
        parts.append(dense if latents is None else dense[:, latents])
    return Firings(
        fires=torch.cat(parts), token=ids[data.keep], before=before[data.keep], after=after[data.keep]
    )  # fmt: skip


def auc(score: Float[Tensor, "n latent"], positive: Bool[Tensor, "n latent"]) -> Float[Tensor, "latent"]:
    """Area under the ROC curve of each column, ties counted half; NaN where a column has one class only."""
    n, found = len(score), torch.empty(score.shape[1], dtype=torch.float64)
    for column in range(score.shape[1]):
        _, place, counts = score[:, column].double().unique(return_inverse=True, return_counts=True)
        ranks = (counts.cumsum(0) - (counts - 1) / 2)[place]
        n_positive = int(positive[:, column].sum())
        total = float(ranks[positive[:, column]].sum()) - n_positive * (n_positive + 1) / 2
        pairs = n_positive * (n - n_positive)
        found[column] = total / pairs if pairs else torch.nan
    return found


def token_rates(train: Firings, test: Firings) -> Float[Tensor, "n latent"]:
    """Predicted rate of firing at every test token, from the token and the one before it."""
    base = train.fires.double().mean(0)
    single = _rates(train.token, test.token, train.fires, base.expand(len(test.token), -1))
    pair_train = _pairs(train)
    return _rates(pair_train, _pairs(test), train.fires, single)


def _pairs(at: Firings) -> Tensor:
    return (at.before + 1) * (1 << 32) + at.token


def _rates(seen: Tensor, asked: Tensor, fires: Tensor, below: Tensor) -> Tensor:
    keys, place = seen.unique(return_inverse=True)
    counts = torch.bincount(place, minlength=len(keys)).double()
    fired = torch.zeros(len(keys), fires.shape[1], dtype=torch.float64).index_add_(0, place, fires.double())
    where = torch.searchsorted(keys, asked).clamp_max(len(keys) - 1)
    known = (keys[where] == asked)[:, None]
    n, n_fired = torch.where(known, counts[where][:, None], 0.0), torch.where(known, fired[where], 0.0)
    return (n_fired + below) / (n + 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Lexical:
    """Token and lens scores of sampled latents."""

    table: pd.DataFrame
    """latent, density, token_auc, token_auc_null, lens, lens_base, lens_null; those of the lens NaN without one."""
    n_rare: int
    """Latents that fire too seldom to be scored."""

    def mean(self, column: str) -> float | None:
        """Mean over the sampled latents; None where there is none."""
        values = self.table[column].to_numpy(dtype=float)
        values = values[~np.isnan(values)]
        return float(values.mean()) if len(values) else None

    @property
    def lens_lift(self) -> float | None:
        firing, base = self.mean("lens"), self.mean("lens_base")
        return None if firing is None or base is None else firing - base


@torch.no_grad()
def lexical(
    model: LoadedModel,
    dictionary: Dictionary,
    train: HeldOut,
    test: HeldOut,
    *,
    n_latents: int = N_LATENTS,
    seed: int = 0,
) -> Lexical:
    """Score randomly drawn latents; train and test are other texts."""
    if train.record.hash == test.record.hash:
        raise InterpError("token rates would be counted on the text they are tested on; pass other text")
    counts = [_counts(dictionary, data) for data in (train, test)]
    usual = (torch.minimum(*counts) >= MIN_FIRINGS) & (counts[1] < int(test.keep.sum()))
    often = usual.nonzero()[:, 0]
    drawn = torch.randperm(len(often), generator=torch_generator(seed, "lexical"))[:n_latents]
    latents = often[drawn].sort().values
    seen, asked = firings(dictionary, train, latents), firings(dictionary, test, latents)
    rates = token_rates(seen, asked)
    order = torch.randperm(len(asked.token), generator=torch_generator(seed, "lexical-null"))
    columns = {
        "latent": latents,
        "density": asked.fires.double().mean(0),
        "token_auc": auc(rates, asked.fires),
        "token_auc_null": auc(rates, asked.fires[order]),
        **_lens(promoted_tokens(model, dictionary.features[latents.to(dictionary.features.device)]), asked),
    }
    return Lexical(
        table=pd.DataFrame({name: column.numpy() for name, column in columns.items()}),
        n_rare=dictionary.d_dict - len(often),
    )


def _counts(dictionary: Dictionary, data: HeldOut) -> Int[Tensor, "d_dict"]:
    total = torch.zeros(dictionary.d_dict, dtype=torch.long)
    for row in range(len(data.x)):
        total += dictionary.encode(data.x[row][data.keep[row].to(data.x.device)]).firings().cpu()
    return total


def _lens(tokens: Tensor | None, at: Firings) -> dict[str, Tensor]:
    """Hits of the next token among the promoted ones: where the latent fires, everywhere, with another's tokens."""
    empty = torch.full((at.fires.shape[1],), torch.nan, dtype=torch.float64)
    if tokens is None or len(tokens) == 0:
        return {"lens": empty, "lens_base": empty, "lens_null": empty}
    known = at.after >= 0
    after, fires = at.after[known], at.fires[known]
    hits = torch.stack([torch.isin(after, row) for row in tokens], dim=1).double()
    fired = fires.double()

    def rate(of: Tensor) -> Tensor:
        return (of * fired).sum(0) / fired.sum(0)  # NaN where a latent fires only at last tokens

    return {"lens": rate(hits), "lens_base": hits.mean(0), "lens_null": rate(hits.roll(1, dims=1))}
