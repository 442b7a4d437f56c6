"""Text for a judgement, all of it offline: what is evaluated, what comparisons are trained on, and labelled text.

Concepts are corpora: from which of several packages does a docstring come, or is it Python's reference? Real text with
labels that everybody has. First letters of words are the concept of the absorption test: words that are one token,
each after the same few examples, read at the word.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.errors import InterpError
from interp.core.seed import torch_generator
from interp.core.sites import Site
from interp.dictionaries.heldout import HeldOut, held_out
from interp.dictionaries.judge.concepts import Labelled, labelled
from interp.dictionaries.sinks import ordinary
from interp.instrument.capture import capture
from interp.instrument.tokens import TokenRecord, from_ids
from interp.models.model import LoadedModel
from interp.tasks.corpora import corpus_documents, load_corpus, token_ids

CONCEPTS = ("docs", "docstrings:rich", "docstrings:numpy", "docstrings:pandas")
"""Packages that are always installed beside this one."""
SPELLING = " apple starts with A\\n river starts with R\\n stone starts with S\\n music starts with M\\n"


@dataclass(frozen=True, kw_only=True, eq=False)
class Texts:
    """Disjoint text: to train comparisons and count token rates on, and to score on."""

    train: TokenRecord
    test: TokenRecord
    name: str
    """Where it comes from, for the manifest."""

    def __post_init__(self) -> None:
        if self.train.hash == self.test.hash:
            raise InterpError("the test text is the training text; take other sequences")
        if len(self.test) < 2:
            raise InterpError(f"{len(self.test)} test sequences give no interval; use at least 2, better 20")


def load_texts(
    model: LoadedModel, corpus: str = "docs", *, n_train: int, n_test: int, length: int, skip_tokens: int = 0
) -> Texts:
    """The sequences after the first `skip_tokens`: leave out what the judged dictionary was trained on."""
    skip = math.ceil(skip_tokens / length)
    return Texts(
        test=load_corpus(model, corpus, n_test, length, skip=skip),
        train=load_corpus(model, corpus, n_train, length, skip=skip + n_test),
        name=corpus,
    )


@torch.no_grad()
def gathered(model: LoadedModel, texts: Texts, site: Site, *, drop_norm: float) -> tuple[HeldOut, HeldOut]:
    """Activations of training and test text; position 0 and massive activations left out, by the training median."""
    raw = held_out(model, texts.train, site, drop_norm=0.0, median=1.0)
    if raw.x.ndim != 3:
        raise InterpError(f"{site} has {raw.x.ndim - 2} axes per token; a dictionary takes one, e.g. resid_post")
    median = float(raw.tokens.norm(dim=-1).median())
    keep = raw.keep & ordinary(raw.x, drop_norm, median=median).cpu()
    if drop_norm:
        keep &= torch.arange(raw.x.shape[1]) != texts.train.first[:, None]
    if not bool(keep.any()):
        raise InterpError("no training token is left; raise drop_norm")
    train = HeldOut(record=texts.train, site=site, x=raw.x, keep=keep)
    return train, held_out(model, texts.test, site, drop_norm=drop_norm, median=median)


def concept_records(model: LoadedModel, names: Sequence[str], *, n_texts: int, length: int) -> dict[str, TokenRecord]:
    """Sequences of each corpus, in the order of its documents."""
    found: dict[str, TokenRecord] = {}
    for name in names:
        rows = token_ids(model, corpus_documents(name), enough=n_texts * length)
        ids = [token for row in rows for token in row][: n_texts * length]
        if len(ids) < n_texts * length:
            raise InterpError(f"{name!r} gives {len(ids)} tokens, asked for {n_texts * length}; ask for fewer texts")
        found[name] = from_ids(model, torch.tensor(ids).view(n_texts, length))
    return found


@torch.no_grad()
def concept_activations(
    model: LoadedModel, records: dict[str, TokenRecord], site: Site, *, n_train: int, drop_norm: float
) -> tuple[Labelled, Labelled]:
    """The first texts of each concept to train on, the others to test on."""
    parts: list[tuple[str, Tensor, Tensor]] = []
    for name, record in records.items():
        raw = held_out(model, record, site, drop_norm=0.0, median=1.0)
        keep = raw.keep & (torch.arange(raw.x.shape[1]) != record.first[:, None])
        parts.append((name, raw.x.cpu(), keep & ordinary(raw.x, drop_norm).cpu()))
    early = labelled([(name, x[:n_train], keep[:n_train]) for name, x, keep in parts])
    return early, labelled([(name, x[n_train:], keep[n_train:]) for name, x, keep in parts])


@torch.no_grad()
def first_letters(
    model: LoadedModel, site: Site, *, n_words: int, seed: int = 0, batch_size: int = 32
) -> tuple[Float[Tensor, "n d"], Int[Tensor, "n"]]:
    """Activations at words that are one token, and the number of their first letter (a is 0)."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise InterpError(f"{model.source} has no tokenizer, so it has no words")
    words = [(i, text[1:]) for i in range(len(tokenizer)) if _is_word(text := tokenizer.decode([i]))]
    if len(words) < n_words:
        raise InterpError(f"the vocabulary has {len(words)} words of one token, asked for {n_words}; ask for fewer")
    order = torch.randperm(len(words), generator=torch_generator(seed, "words"))[:n_words].tolist()
    prefix = tokenizer(SPELLING, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[*prefix, words[i][0]] for i in order])
    parts: list[Tensor] = []
    for some in ids.split(batch_size):
        with capture(model, site) as acts:
            model(some)
        parts.append(acts[site][:, -1].float().cpu())
    return torch.cat(parts), torch.tensor([string.ascii_lowercase.index(words[i][1][0]) for i in order])


def _is_word(text: str) -> bool:
    word = text[1:]
    return text[:1] == " " and len(word) >= 3 and word.isascii() and word.isalpha() and word.islower()
