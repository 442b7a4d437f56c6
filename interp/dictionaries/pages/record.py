"""The one pass of the model: every token's sparse codes to disk, and totals of every latent in memory.

Which tokens count: real ones that are not the first of their row and whose norm is at most `drop_norm` times the
median norm (see `interp.dictionaries.sinks`). The median is that of the first tokens of the input, a number that does
not depend on how rows are put into batches. Tokens that do not count are kept as context, with no latent firing.
Source of the order (cache codes first, then look at latents): Delphi, https://github.com/EleutherAI/delphi.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.errors import InterpError
from interp.core.progress import track
from interp.core.sites import Site
from interp.dictionaries.base import Dictionary, check_width
from interp.dictionaries.codes import SparseCodes
from interp.dictionaries.pages.codes_file import MAX_PER_TOKEN, Codes, CodesWriter
from interp.instrument.stream import Batch, Batches
from interp.instrument.stream_rows import Rows, run_batch
from interp.instrument.tokens import TokenRecord
from interp.models.model import LoadedModel

NORM_TOKENS = 8192
"""Tokens whose norms give the median: the first ones."""
BLOCK = 2048
"""Tokens encoded at once."""


@dataclass(kw_only=True, eq=False)
class Totals:
    """Per latent, over all tokens that count: number of firings, sum, sum of squares, largest value."""

    firings: Int[np.ndarray, " d_dict"]
    total: Float[np.ndarray, " d_dict"]
    square: Float[np.ndarray, " d_dict"]
    maximum: Float[np.ndarray, " d_dict"]
    n_tokens: int = 0
    n_counted: int = 0
    strings: dict[int, str] = field(default_factory=dict[int, str])
    """Text of every token id that was read."""

    @classmethod
    def empty(cls, d_dict: int) -> Totals:
        zeros = [np.zeros(d_dict) for _ in range(3)]
        return cls(firings=np.zeros(d_dict, dtype=np.int64), total=zeros[0], square=zeros[1], maximum=zeros[2])

    def add(self, latents: Int[np.ndarray, " n"], values: Float[np.ndarray, " n"]) -> None:
        """Take in firings."""
        wide, size = values.astype(np.float64), len(self.firings)
        self.firings += np.bincount(latents, minlength=size)
        self.total += np.bincount(latents, weights=wide, minlength=size)
        self.square += np.bincount(latents, weights=wide * wide, minlength=size)
        np.maximum.at(self.maximum, latents, wide)


@torch.no_grad()
def record_codes(
    model: LoadedModel, dictionary: Dictionary, data: Batches, site: Site, folder: Path, *, drop_norm: float
) -> tuple[Codes, Totals]:
    """Run everything through the model and the dictionary once."""
    totals = Totals.empty(dictionary.d_dict)
    ahead, median = _first_batches(model, data, site) if drop_norm else ({}, None)
    like = dictionary.features
    with CodesWriter(folder) as writer:
        for number in track(range(data.n_batches), "encoding the corpus"):
            batch = data.batch(number)
            record = _text(batch)
            rows = ahead.pop(number) if number in ahead else run_batch(model, batch, [site])
            x = rows[site].flatten(1).float()
            check_width(x, dictionary.d_in)
            kept = _counted(rows, record, x, median, drop_norm)
            chosen = x[kept.to(x.device)].to(like.device, like.dtype)
            counts, latents, values = firings(dictionary, chosen)
            per_token = np.zeros(len(x), dtype=np.int64)
            per_token[kept.numpy()] = counts
            ids = record.ids[record.mask]
            writer.append(
                batch.rows.numpy(), record.lengths.numpy(), ids.numpy(), kept.numpy(), per_token, latents, values
            )
            totals.add(latents, values)
            totals.n_tokens, totals.n_counted = totals.n_tokens + len(x), totals.n_counted + len(chosen)
            totals.strings |= {
                i: text
                for row, texts in zip(record.ids.tolist(), record.strings, strict=True)
                for i, text in zip(row, texts, strict=True)
                if text
            }
    if not totals.n_counted:
        raise InterpError("no token counts: every one is the first of its row or has a massive activation; drop_norm=0")
    return writer.codes(), totals


def firings(
    dictionary: Dictionary, x: Float[Tensor, "n d_in"]
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " firing"], Float[np.ndarray, " firing"]]:
    """Number of firings of each token, then latent and value of each firing, by token and then by latent."""
    counts, latents, values = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
    for part in x.split(BLOCK) if len(x) else ():
        token, latent, value = entries(dictionary.encode(part))
        counts.append(torch.bincount(token, minlength=len(part)).numpy())
        latents.append(latent.numpy())
        values.append(value.numpy())
    if int(max(len(part) and part.max() for part in counts)) > MAX_PER_TOKEN:
        raise InterpError(f"more than {MAX_PER_TOKEN} latents fire at one token; these codes are not sparse")
    return np.concatenate(counts), np.concatenate(latents), np.concatenate(values)


def entries(codes: SparseCodes) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Token, latent and value of each firing on the cpu; a latent listed twice at a token is summed."""
    matrix = codes.coo()
    where, value = matrix.indices().cpu(), matrix.values().float().cpu()
    if not bool(torch.isfinite(value).all()):
        raise InterpError("a latent is not finite; check the dictionary (interp sae health)")
    if bool((value < 0).any()):
        raise InterpError(
            "a latent is negative: feature pages show latents that fire upwards, so neither PCA nor signed codes"
        )
    alive = value > 0
    return where[0][alive], where[1][alive], value[alive]


def _text(batch: Batch) -> TokenRecord:
    if batch.record is None:
        raise InterpError("feature pages need text: batches of token records, not of other inputs")
    return batch.record


def _counted(rows: Rows, record: TokenRecord, x: Tensor, median: float | None, drop_norm: float) -> Tensor:
    """Which rows of x count, on the cpu."""
    if median is None:
        return torch.ones(len(x), dtype=torch.bool)
    first = rows.tokens[1] == record.first[rows.item]
    return (x.norm(dim=-1).cpu() <= drop_norm * median) & ~first


def _first_batches(model: LoadedModel, data: Batches, site: Site) -> tuple[dict[int, Rows], float]:
    """The batches with the first tokens, to be used again, and the median norm of these tokens."""
    found: dict[int, Rows] = {}
    norms: list[Tensor] = []
    for number in range(data.n_batches):
        found[number] = run_batch(model, data.batch(number), [site])
        norms.append(found[number][site].flatten(1).float().norm(dim=-1).cpu())
        if sum(map(len, norms)) >= NORM_TOKENS:
            break
    return found, float(torch.cat(norms)[:NORM_TOKENS].median())
