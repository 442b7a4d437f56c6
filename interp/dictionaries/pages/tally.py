"""The second pass, over codes on disk: what one chunk of latents needs, block by block.

Per latent of the chunk: the histogram of its firing values over (0, max] (the maximum is known from the first pass),
its strongest examples, random examples of each interval of (0, max], how often the next token is among those that its
logit lens promotes, on which token ids it fires, and its correlation with every latent of the dictionary,
    r_ij = (N sum f_i f_j - sum f_i sum f_j) / sqrt((N sum f_i^2 - (sum f_i)^2) (N sum f_j^2 - (sum f_j)^2)),
over the N counted tokens, zeros included. Everything is a sum or a best-of, so blocks of any size give the same.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

from interp.dictionaries.pages.codes_file import Block, Codes
from interp.dictionaries.pages.config import PagesConfig
from interp.dictionaries.pages.keep import Best, Kept, lottery, window_keys
from interp.dictionaries.pages.record import Totals

BLOCK_TOKENS = 16_384
"""Tokens of codes in memory at once."""


class Tally:
    """Counts of one chunk of latents and of their stand-ins."""

    def __init__(
        self,
        latents: Int[np.ndarray, " n"],
        nulls: Int[np.ndarray, " n"],
        totals: Totals,
        cfg: PagesConfig,
        *,
        d_vocab: int,
        promoted: Int[np.ndarray, "n listed"] | None = None,
        promoted_null: Int[np.ndarray, "n listed"] | None = None,
    ) -> None:
        """nulls: the stand-in of each latent, -1 for none; promoted: ids that each latent's lens puts on top."""
        self.latents, self.nulls, self.totals, self.cfg = latents, nulls, totals, cfg
        self.promoted, self.promoted_null = promoted, promoted_null
        n, d_dict = len(latents), len(totals.firings)
        self.top = Best(n, cfg.n_top)
        self.spread = Best(n * cfg.n_intervals, cfg.n_per_interval)
        self.histogram = np.zeros((n, cfg.n_bins), dtype=np.int64)
        self.hits, self.hits_null, self.n_next = (np.zeros(n, dtype=np.int64) for _ in range(3))
        self.watched = np.unique(np.concatenate([latents, nulls[nulls >= 0]]))
        """The latents and their stand-ins."""
        self.products = np.zeros((len(self.watched), d_dict))
        """sum over tokens of f_i f_j, for each watched latent i."""
        self.ids = np.zeros((len(self.watched), d_vocab), dtype=np.int32)
        """Firings of each watched latent on each token id."""
        self._place = _places(latents, d_dict)
        self._watch = _places(self.watched, d_dict)
        self._n_rows = 0

    def read(self, codes: Codes, block_tokens: int = BLOCK_TOKENS) -> None:
        for block in codes.blocks(block_tokens):
            self.update(block)

    def update(self, block: Block) -> None:
        mine = (self._place[block.latent] >= 0).nonzero()[0]
        place, token, value = self._place[block.latent[mine]], block.token[mine], block.value[mine]
        bins = self._bins(place, value)
        np.add.at(self.histogram, (place, bins), 1)
        self._examples(block, place, token, value, bins)
        self._hits(block, place, token)
        self._pairs(block)
        self._n_rows += len(block.rows)

    def _bins(self, place: Int[np.ndarray, " m"], value: Float[np.ndarray, " m"]) -> Int[np.ndarray, " m"]:
        """Bin i holds max * (i, i + 1] / n_bins."""
        share = value.astype(np.float64) / self.totals.maximum[self.latents[place]]
        return np.clip(np.ceil(share * self.cfg.n_bins).astype(np.int64) - 1, 0, self.cfg.n_bins - 1)

    def _examples(
        self,
        block: Block,
        place: Int[np.ndarray, " m"],
        token: Int[np.ndarray, " m"],
        value: Float[np.ndarray, " m"],
        bins: Int[np.ndarray, " m"],
    ) -> None:
        row, pos = block.row_of[token] + self._n_rows, block.pos[token]
        interval = bins // (self.cfg.n_bins // self.cfg.n_intervals)
        luck = lottery(self.cfg.seed, self.latents[place], row, pos)
        for best, group, score in (
            (self.top, place, value.astype(np.float64)),
            (self.spread, place * self.cfg.n_intervals + interval, luck),
        ):
            at = best.hopeful(group, score)
            keys = window_keys(block.windows(token[at], self.cfg.same_window))
            best.update(Kept(group=group[at], score=score[at], row=row[at], pos=pos[at], key=keys))

    def _hits(self, block: Block, place: Int[np.ndarray, " m"], token: Int[np.ndarray, " m"]) -> None:
        if self.promoted is None or self.promoted_null is None:
            return
        following = block.following[token]
        known = following >= 0
        place, following = place[known], following[known, None]
        n = len(self.latents)
        self.n_next += np.bincount(place, minlength=n)
        self.hits += np.bincount(place[(self.promoted[place] == following).any(1)], minlength=n)
        self.hits_null += np.bincount(place[(self.promoted_null[place] == following).any(1)], minlength=n)

    def _pairs(self, block: Block) -> None:
        """Which watched latents fire on which ids, and with which latents."""
        watch = self._watch[block.latent]
        mine = (watch >= 0).nonzero()[0]
        watch, token = watch[mine], block.token[mine]
        np.add.at(self.ids, (watch, block.id[token]), 1)
        n_tokens, d_dict = len(block.id), self.products.shape[1]
        some = (block.value[mine].astype(np.float64), (watch, token))
        every = (block.value.astype(np.float64), (block.token, block.latent))
        left = sparse.csr_matrix(some, shape=(len(self.watched), n_tokens))
        right = sparse.csr_matrix(every, shape=(n_tokens, d_dict))
        found = sparse.coo_matrix(left @ right)
        self.products[found.row, found.col] += found.data  # every place once: a product of csr matrices

    def correlations(self, latents: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n d_dict"]:
        """Pearson of watched latents with all, over the counted tokens; 0 where one of the two never varies."""
        totals, n = self.totals, self.totals.n_counted
        spread = np.clip(n * totals.square - totals.total**2, 0, None)
        products = self.products[np.searchsorted(self.watched, latents)]
        above = n * products - totals.total[latents, None] * totals.total
        below = np.sqrt(spread[latents, None] * spread)
        return np.divide(above, below, out=np.zeros_like(above), where=below > 0)

    def cosines(self, latents: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n d_dict"]:
        """Cosine of the activations of watched latents with those of all; 0 where one never fires."""
        square = self.totals.square
        below = np.sqrt(square[latents, None] * square)
        products = self.products[np.searchsorted(self.watched, latents)]
        return np.divide(products, below, out=np.zeros_like(products), where=below > 0)

    def commonest(self) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Per latent the id it fires most on, its share of the firings, and that of the stand-in's firings (nan)."""
        counts = self.ids[np.searchsorted(self.watched, self.latents)]
        ids = counts.argmax(1)
        share = _share(counts[np.arange(len(ids)), ids], counts.sum(1))
        null = np.full(len(ids), np.nan)
        has: Bool[np.ndarray, " n"] = self.nulls >= 0
        other = self.ids[np.searchsorted(self.watched, self.nulls[has])]
        null[has] = _share(other[np.arange(len(other)), ids[has]], other.sum(1))
        return ids, share, null

    def next_hits(self) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Share of firings whose next token is promoted, by the latent's own list and by the stand-in's (nan)."""
        null = np.where(self.nulls >= 0, _share(self.hits_null, self.n_next), np.nan)
        return _share(self.hits, self.n_next), null


def _places(latents: Int[np.ndarray, " n"], d_dict: int) -> Int[np.ndarray, " d_dict"]:
    """Place of each latent in the list, -1 for the others."""
    places = np.full(d_dict, -1, dtype=np.int64)
    places[latents] = np.arange(len(latents))
    return places


def _share(part: Int[np.ndarray, " n"], whole: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """part / whole, nan where the whole is 0."""
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)
