"""Prompts that are made of token ids, so that any model with a vocabulary can be asked.

Tokens are drawn from the ordinary ones: no special or added token, none beyond the tokenizer's own. The start token
comes first where the model's tokenizer adds one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from interp.core.errors import InterpError
from interp.instrument.tokens import adds_start, from_ids
from interp.models.model import LoadedModel
from interp.tasks.base import PromptPairs
from interp.tasks.metrics import Metric

Ids = Int[Tensor, "pair pos"]
Where = Int[Tensor, " pair"]


def ordinary(model: LoadedModel, at_least: int) -> Int[Tensor, " token"]:
    """Ids of the ordinary tokens, ascending; an InterpError if there are fewer than the task needs."""
    size, tokenizer = model.dims.d_vocab, model.tokenizer
    if size is None:
        raise InterpError(f"{model.source} has no vocabulary: nothing can be asked of it in tokens")
    left_out: set[int] = set()
    if tokenizer is not None:
        size = min(size, len(tokenizer))
        left_out = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    ids = torch.tensor([i for i in range(size) if i not in left_out], dtype=torch.long)
    if len(ids) < at_least:
        raise InterpError(f"this task needs {at_least} different tokens; {model.source} has {len(ids)} ordinary ones")
    return ids


def distinct(pool: Int[Tensor, " token"], n: int, k: int, generator: torch.Generator) -> Int[Tensor, "pair k"]:
    """`n` rows of `k` different tokens of a pool."""
    return torch.stack([pool[torch.randperm(len(pool), generator=generator)[:k]] for _ in range(n)])


def from_sequences(
    model: LoadedModel,
    clean: Ids,
    corrupt: Ids,
    answers: Int[Tensor, "pair 2"],
    roles: Mapping[str, Where],
    own: Metric | None = None,
    notes: Sequence[str] = (),
) -> PromptPairs:
    """Pairs of sequences, with the start token where there is one; `END` is added."""
    start = model.tokenizer is not None and adds_start(model)
    if start:
        bos = int(model.tokenizer.bos_token_id)  # pyright: ignore[reportOptionalMemberAccess]
        clean, corrupt = (F.pad(ids, (1, 0), value=bos) for ids in (clean, corrupt))
    return PromptPairs(
        clean=from_ids(model, clean),
        corrupt=from_ids(model, corrupt),
        answers=answers,
        roles={name: where + int(start) for name, where in roles.items()}
        | {"END": torch.full((len(clean),), clean.shape[1] - 1)},
        notes=(
            *(("the prompts begin with the start token that this model's tokenizer adds",) if start else ()),
            *notes,
        ),
        own=own,
    )
