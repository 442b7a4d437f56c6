"""A dictionary whose latents are known: each fires on a set of token ids, and nowhere else."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from interp.core.seed import torch_generator
from interp.dictionaries.activations.relu import ReLU
from interp.dictionaries.codes import SparseCodes, from_dense
from interp.dictionaries.dictionary import SparseDictionary
from interp.instrument.capture import capture
from interp.instrument.tokens import TokenRecord, from_ids
from interp.models.model import LoadedModel
from interp.models.tiny import tiny_model

SITE = "resid_pre.0"
"""Holds the embedding of each token, so a latent can tell the token from it."""
WORDS = "abcdefgh"


class TokenDictionary:
    """Latent i has the value `strength[i]` on the ids of `sets[i]`."""

    def __init__(self, embedding: Tensor, sets: list[set[int]], rows: Tensor, strength: list[float]) -> None:
        self.embedding, self.rows = embedding, rows
        self.table = torch.zeros(len(embedding), len(sets))
        for i, ids in enumerate(sets):
            self.table[sorted(ids), i] = strength[i]

    @property
    def d_in(self) -> int:
        return self.embedding.shape[1]

    @property
    def d_dict(self) -> int:
        return self.table.shape[1]

    @property
    def features(self) -> Tensor:
        return self.rows

    def encode(self, x: Tensor) -> SparseCodes:
        same = (x.reshape(-1, 1, self.d_in) == self.embedding).all(-1)
        assert bool(same.any(1).all()), "every input is an embedding"
        return from_dense(self.table[same.int().argmax(1)]).shaped(*x.shape[:-1])

    def decode(self, codes: SparseCodes) -> Tensor:
        return codes.dense() @ self.rows + 1.0


@functools.cache
def model() -> LoadedModel:
    return tiny_model("llama")


def text(n_rows: int = 12, length: int = 40, seed: int = 0, alphabet: int = 8) -> TokenRecord:
    """Random letters."""
    ids = torch.randint(0, alphabet, (n_rows, length), generator=torch_generator(seed, "text")) + ord("a")
    return from_ids(model(), ids)


def dictionary() -> TokenDictionary:
    """Latent 0 is `a`, 1 is `b` with nearly the row of 0, 2 fires with 0, 3 on `c` and `d`, 4 never, 5 on the rest."""
    embedding = model().weight("W_E").detach()
    generator = torch_generator(1, "rows")
    rows = torch.randn(6, embedding.shape[1], generator=generator) * 0.5
    rows[1] = rows[0] + 0.01 * torch.randn(embedding.shape[1], generator=generator)
    a, b, c, d, *rest = (ord(word) for word in WORDS)
    return TokenDictionary(embedding, [{a}, {b}, {a}, {c, d}, {0}, set(rest)], rows, [2.0, 1.0, 0.5, 1.5, 1.0, 0.25])


def dense_dictionary(d: int = 32, d_dict: int = 48, d_out: int | None = None) -> SparseDictionary:
    """Random rows; half of the latents fire at a token."""
    made = SparseDictionary(d, d_dict, ReLU(), d_out=d_out)
    generator = torch_generator(3, "dense")
    with torch.no_grad():
        made.W_enc.copy_(torch.randn(d, d_dict, generator=generator) * 0.2)
        made.W_dec.copy_(torch.randn(made.W_dec.shape, generator=generator) * 0.3)
        made.b_enc.copy_(torch.randn(d_dict, generator=generator) * 0.3)
        made.b_dec.copy_(torch.randn(made.b_dec.shape, generator=generator) * 0.1)
    return made.requires_grad_(False)


def activations(model: LoadedModel, record: TokenRecord, site: str) -> torch.Tensor:
    with capture(model, site) as acts:
        model(record)
    return acts[site]
