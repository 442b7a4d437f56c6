"""Induction: does a model continue a sequence that it has seen once, though its tokens mean nothing?

    r_1 r_2 ... r_S  r_1 r_2 ... r_(S-1)  ->  r_S        r: different random tokens
    target   r_S becomes another token where it stood first: the answer becomes that token
    query    the last token becomes another one of the sequence: the answer becomes what followed that one
    fresh    the whole second half is new: nothing can be predicted; measured over all of it (below)
For `fresh` the metric is the mean over the second half of logit(next token) - logit(next token of the fresh half).
Roles: A1 (where the last token stood first), B1 (what followed it: the answer), END.
Paper: C. Olsson et al., In-context learning and induction heads, 2022, https://arxiv.org/abs/2209.11895.
Beware: the distance to copy from is the same everywhere, so a head that always looks S - 1 back does as well; `copying`
tells the two apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from interp.core.errors import InterpError
from interp.core.seed import torch_generator
from interp.models.model import LoadedModel
from interp.tasks.base import PromptPairs
from interp.tasks.metrics import Logits, Rows, Values
from interp.tasks.sequences import distinct, from_sequences, ordinary
from interp.tasks.task import Request, Task

LENGTH = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class SequenceDiff:
    """Mean over the last positions of logit(right) - logit(wrong), each position with answers of its own."""

    right: Int[Tensor, "pair last"]
    wrong: Int[Tensor, "pair last"]
    name: str = "logit_diff"

    @property
    def n_last(self) -> int:
        return self.right.shape[1]

    def __call__(self, logits: Logits, rows: Rows) -> Values:
        answers = torch.stack([self.right, self.wrong], dim=-1).to(logits.device)[rows.to(logits.device)]
        right, wrong = logits[:, -self.n_last :].gather(-1, answers).unbind(-1)
        return (right - wrong).mean(-1)

    def take(self, rows: Sequence[int]) -> SequenceDiff:
        index = list(rows)
        return SequenceDiff(right=self.right[index], wrong=self.wrong[index], name=self.name)


def induction_pairs(model: LoadedModel, request: Request, length: int = LENGTH) -> PromptPairs:
    """Pairs of sequences of `length` tokens and their repetition up to the last but one."""
    if length < 3:
        raise InterpError(f"length={length}: a sequence to be repeated needs at least 3 tokens")
    generator = torch_generator(request.seed, "induction", request.split)
    drawn = distinct(ordinary(model, 2 * length), request.n, 2 * length, generator)
    first, new = drawn[:, :length], drawn[:, length:]
    clean = torch.cat([first, first[:, :-1]], dim=1)
    corrupt, own = clean.clone(), None
    if request.corruption == "target":
        wrong = corrupt[:, length - 1] = new[:, -1]
    elif request.corruption == "query":
        other = torch.randint(length - 2, (request.n, 1), generator=generator)
        corrupt[:, -1:] = first.gather(1, other)
        wrong = first.gather(1, other + 1)[:, 0]
    else:
        corrupt[:, length:], wrong = new[:, :-1], new[:, -1]
        own = SequenceDiff(right=first[:, 1:], wrong=new[:, 1:])
    return from_sequences(
        model,
        clean,
        corrupt,
        torch.stack([first[:, -1], wrong], dim=1),
        {"A1": torch.full((request.n,), length - 2), "B1": torch.full((request.n,), length - 1)},
        own,
    )


TASK = Task(
    name="induction",
    question="Does the model continue a random sequence that it has seen once?",
    example="q k f w q k f -> w",
    corruptions={
        "target": "the answer becomes another token where it stood first (the answer becomes that one)",
        "query": "the last token becomes another of the sequence (the answer becomes what followed that one)",
        "fresh": "the second half is new (nothing can be predicted)",
    },
    roles={"A1": "where the last token stood first", "B1": "what followed it: the answer", "END": "the last token"},
    make=induction_pairs,
    words=False,
    paper="https://arxiv.org/abs/2209.11895",
)
