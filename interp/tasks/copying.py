"""Copying: does a model copy by place where a match of the last token is not enough?

    | s_1 ... s_S | s_1 ... s_j  ->  s_(j+1)        s: drawn from an alphabet of few random tokens, | a separator
The last token s_j occurs several times in the source and is followed by different tokens there, so a reader that
continues after any earlier occurrence of the last token is often wrong; one that keeps its place is always right.
    target   s_(j+1) becomes another letter in the source: the answer becomes that letter
    source   another source and its copy: the answer becomes another letter
Roles: SOURCE (where the answer stands in the source), SEP1, SEP2 (the separators), END.
Beware: a match of the last two or three tokens is nearly always enough, so copying does not prove counting.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from interp.core.errors import InterpError
from interp.core.seed import torch_generator
from interp.models.model import LoadedModel
from interp.tasks.base import PromptPairs
from interp.tasks.sequences import distinct, from_sequences, ordinary
from interp.tasks.task import Request, Task

LENGTH, COPIED, N_LETTERS = 12, 9, 4
TRIES = 10_000
"""Sources drawn for one row before giving up on an ambiguous one."""


def ambiguous(source: Int[Tensor, " place"], copied: int) -> bool:
    """Whether the last copied letter is followed by different letters in the source."""
    follows = source[1:][source[:-1] == source[copied - 1]]
    return len(follows.unique()) > 1


def sources(
    n: int, generator: torch.Generator, *, length: int = LENGTH, copied: int = COPIED, n_letters: int = N_LETTERS
) -> Int[Tensor, "pair length"]:
    """Numbers of letters, each row ambiguous."""
    if not 2 <= copied < length or n_letters < 2:
        raise InterpError(f"copied={copied} must lie in 2..{length - 1}, with at least 2 letters, got {n_letters}")
    rows: list[Tensor] = []
    for _ in range(n):
        draws = (torch.randint(n_letters, (length,), generator=generator) for _ in range(TRIES))
        found = next((row for row in draws if ambiguous(row, copied)), None)
        if found is None:
            raise InterpError(f"no ambiguous source of {length} tokens among {TRIES}; make it longer")
        rows.append(found)
    return torch.stack(rows)


def copying_pairs(
    model: LoadedModel, request: Request, length: int = LENGTH, copied: int = COPIED, n_letters: int = N_LETTERS
) -> PromptPairs:
    """Pairs of a source of `length` letters and its copy up to `copied`."""
    n, generator = request.n, torch_generator(request.seed, "copying", request.split)
    pool = ordinary(model, n_letters + 1)
    letters = distinct(pool, n, n_letters + 1, generator)
    separator, letters = letters[:, :1], letters[:, 1:]
    chosen = sources(n, generator, length=length, copied=copied, n_letters=n_letters)
    other = chosen.clone()
    if request.corruption == "target":
        shift = 1 + torch.randint(n_letters - 1, (n,), generator=generator)
        other[:, copied] = (other[:, copied] + shift) % n_letters
    else:
        other = sources(n, generator, length=length, copied=copied, n_letters=n_letters)
        same = other[:, copied] == chosen[:, copied]  # renaming the letters keeps the source ambiguous
        other[same] = (other[same] + 1) % n_letters

    def written(source: Tensor, copy: Tensor) -> Tensor:
        spelt, again = letters.gather(1, source), letters.gather(1, copy[:, :copied])
        return torch.cat([separator, spelt, separator, again], dim=1)

    return from_sequences(
        model,
        written(chosen, chosen),
        written(other, chosen if request.corruption == "target" else other),
        torch.stack([letters.gather(1, s[:, copied : copied + 1])[:, 0] for s in (chosen, other)], dim=1),
        {
            "SEP1": torch.zeros(n, dtype=torch.long),
            "SOURCE": torch.full((n,), 1 + copied),
            "SEP2": torch.full((n,), 1 + length),
        },
    )


TASK = Task(
    name="copying",
    question="Does the model keep its place when it copies a sequence of few letters?",
    example="| b a a b c a | b a a b -> c",
    corruptions={
        "target": "the letter to be copied becomes another in the source (the answer becomes that one)",
        "source": "another source and its copy (the answer becomes another letter)",
    },
    roles={
        "SEP1": "the separator before the source",
        "SOURCE": "where the answer stands in the source",
        "SEP2": "the separator after it",
        "END": "the last token",
    },
    make=copying_pairs,
    words=False,
)
