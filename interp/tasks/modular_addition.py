"""Modular addition: a + b = ? (mod p), each number one token.

    a b =  ->  (a + b) mod p        number i is the i-th ordinary token, = the one after the last number
    b   b becomes another number: the answer becomes another
    a   a becomes another number
The table of p x p sums is cut once and for all, at random, into `train` (two thirds) and `test`; a model trained on the
first is asked the second. p = 113, or the largest prime that leaves a token for `=`.
Roles: A, B, END (the equals sign).
Paper: N. Nanda et al., Progress measures for grokking, 2023, https://arxiv.org/abs/2301.05217.
Beware: only a model trained on this numbering of tokens can do it; `check_accuracy` refuses the others. Corrupted
prompts are from the same part of the table.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from interp.core.errors import InterpError
from interp.core.seed import torch_generator
from interp.models.model import LoadedModel
from interp.tasks.base import PromptPairs
from interp.tasks.sequences import from_sequences, ordinary
from interp.tasks.task import EVERY, Request, Task

MODULUS = 113


def modulus_of(n_tokens: int) -> int:
    """113, or the largest prime below the number of tokens."""
    primes = (p for p in range(min(MODULUS, n_tokens - 1), 1, -1) if all(p % d for d in range(2, p)))
    return next(primes, 0)


def table(modulus: int, split: str) -> Int[Tensor, "sum 2"]:
    """The (a, b) of a split, always the same."""
    order = torch.randperm(modulus * modulus, generator=torch_generator(0, "modular addition", modulus))
    cut = len(order) - len(order) // EVERY
    chosen = order[:cut] if split == "train" else order[cut:]
    return torch.stack([chosen // modulus, chosen % modulus], dim=1)


def addition_pairs(model: LoadedModel, request: Request, modulus: int | None = None) -> PromptPairs:
    """Different sums of the split's part of the table; fewer than asked for if the part is smaller."""
    pool = ordinary(model, 6)
    p = modulus or modulus_of(len(pool))
    if not 5 <= p < len(pool):
        raise InterpError(f"modulus={p} needs to be at least 5 and leave one of {len(pool)} ordinary tokens for '='")
    generator = torch_generator(request.seed, "modular addition", request.split)
    sums = table(p, request.split)
    allowed = torch.zeros(p, p, dtype=torch.bool)
    allowed[sums[:, 0], sums[:, 1]] = True
    changed = ("a", "b").index(request.corruption)
    rows: list[tuple[Tensor, Tensor]] = []
    for clean in sums[torch.randperm(len(sums), generator=generator)]:
        row = allowed[clean[0]] if changed else allowed[:, clean[1]]
        others = row.nonzero()[:, 0]
        others = others[others != clean[changed]]
        if not len(others):
            continue
        corrupt = clean.clone()
        corrupt[changed] = others[torch.randint(len(others), (1,), generator=generator)]
        rows.append((clean, corrupt))
        if len(rows) == request.n:
            break
    if not rows:
        raise InterpError(f"the {request.split} part of the table of {p} has no two sums to compare; use a larger p")
    clean, corrupt = (torch.stack(side) for side in zip(*rows, strict=True))
    answers = torch.stack([clean.sum(1) % p, corrupt.sum(1) % p], dim=1)
    equals = torch.full((len(rows), 1), p)
    short = f"{len(rows)} pairs instead of {request.n}: the {request.split} part of the table has no more"
    return from_sequences(
        model,
        pool[torch.cat([clean, equals], dim=1)],
        pool[torch.cat([corrupt, equals], dim=1)],
        pool[answers],
        {"A": torch.zeros(len(rows), dtype=torch.long), "B": torch.ones(len(rows), dtype=torch.long)},
        notes=() if len(rows) == request.n else (short,),
    )


TASK = Task(
    name="modular-addition",
    question="Has the model learnt to add modulo a prime?",
    example="57 88 = -> 32 (mod 113)",
    corruptions={
        "b": "b becomes another number (the answer becomes another)",
        "a": "a becomes another number (the answer becomes another)",
    },
    roles={"A": "the first number", "B": "the second", "END": "the equals sign"},
    make=addition_pairs,
    words=False,
    paper="https://arxiv.org/abs/2301.05217",
)
