"""Text for methods that learn: sequences to train on, and other ones to judge on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from interp.core.errors import InterpError
from interp.core.seed import torch_generator
from interp.instrument.tokens import TokenRecord, from_ids
from interp.models.bundled import cache_dir
from interp.models.model import LoadedModel
from interp.tasks.corpora import load_corpus


@dataclass(frozen=True, kw_only=True, eq=False)
class SplitText:
    """Disjoint text to train on and to judge on."""

    train: TokenRecord
    test: TokenRecord
    store: Path | None
    """Where activation stores are kept; None for a temporary folder."""

    def check(self) -> None:
        """Raise InterpError where judging would mean nothing."""
        if self.test.hash == self.train.hash:
            raise InterpError("the held-out text is the training text; judge on other sequences")
        if len(self.test) < 2:
            raise InterpError(f"n_eval={len(self.test)} held-out sequences give no interval; use at least 2, better 20")

    def facts(self, name: str) -> dict[str, Any]:
        """What a manifest says of it."""
        return {
            "name": name,
            "hash": self.train.hash,
            "hash_held_out": self.test.hash,
            "n_tokens": self.train.n_tokens,
            "n_tokens_held_out": self.test.n_tokens,
        }


def split_corpus(model: LoadedModel, corpus: str, n_train: int, n_eval: int, length: int) -> SplitText:
    """The first sequences of a corpus for training, the next ones held out."""
    return SplitText(
        train=load_corpus(model, corpus, n_train, length),
        test=load_corpus(model, corpus, n_eval, length, skip=n_train),
        store=cache_dir() / "stores",
    )


def random_split(model: LoadedModel, n_train: int, n_eval: int, length: int, label: str) -> SplitText:
    """Random tokens, for a tiny model that cannot read."""
    ids = torch.randint(0, model.dims.d_vocab or 2, (n_train + n_eval, length), generator=torch_generator(0, label))
    return SplitText(train=from_ids(model, ids[:n_train]), test=from_ids(model, ids[n_train:]), store=None)
