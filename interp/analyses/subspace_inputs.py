"""Base and source prompts that differ in one variable, in two sets with no name and no sentence in common (a helper of
`subspace`).

`ioi-position`: whose name came first, the giver's or the receiver's? Base and source are the same sentence, once as
ABBA and once as BABA, with other names, places and things; with the source's order, the base's answer is its own other
name. No single token tells the two orders apart, and no answer of the source is ever wanted (Makelov et al. 2023).
Any other task of the library: its clean prompts are the bases, its corrupted ones the sources, all of one class each,
and the answer wanted is the task's second one; that is the source's own only where the corruption makes it so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from interp.core.errors import InterpError
from interp.core.hash import hash_json
from interp.models.model import LoadedModel
from interp.tasks.base import Draft, PromptPairs
from interp.tasks.ioi import NAMES, OBJECTS, PLACES, TEMPLATES, mirror, random_pairs
from interp.tasks.library import make_pairs
from interp.tasks.task import Picker, Request, draw_pairs, fill, held_out

POSITION = "ioi-position"
ORDERS = ("BABA", "ABBA")


@dataclass(frozen=True, kw_only=True, eq=False)
class SubspaceData:
    """Pairs to learn on and pairs to measure on; `clean` is the base, `corrupt` the source."""

    train: PromptPairs
    test: PromptPairs
    train_label: Bool[Tensor, " train_pair"]
    """Class of each base; its source is of the other one."""
    test_label: Bool[Tensor, " test_pair"]

    @property
    def hash(self) -> str:
        return hash_json([self.train.hash, self.test.hash])


def position_draft(pick: Picker, order: str, split: str) -> Draft:
    """A base of one order and a source of the other; right is the base's receiver, wanted its giver."""
    number = pick.one(held_out(range(len(TEMPLATES)), split))
    names = pick.some(held_out(NAMES, split), 4)

    def prompt(order: str, giver: str, receiver: str) -> str:
        words = {"S1": giver, "S2": giver, "IO": receiver}
        words |= {"PLACE": pick.one(held_out(PLACES, split)), "OBJECT": pick.one(held_out(OBJECTS, split))}
        return fill(TEMPLATES[number] if order == "BABA" else mirror(TEMPLATES[number]), words)[0]

    other = ORDERS[1 - ORDERS.index(order)]
    return Draft(
        clean=prompt(order, names[0], names[1]),
        corrupt=prompt(other, names[2], names[3]),
        right=f" {names[1]}",
        wrong=f" {names[0]}",
        roles={},
        template=f"{order} {number}",
        group=order,
    )


def position_pairs(model: LoadedModel, n: int, seed: int, split: str) -> PromptPairs:
    """`n` pairs of a split, half of the bases BABA."""
    if model.tokenizer is None:
        raise InterpError(f"{model.source} has no tokenizer, and {POSITION} is written in words")
    request = Request(n=n, seed=seed, corruption="position", split=split)
    return draw_pairs(model, request, POSITION, lambda pick, order: position_draft(pick, order, split), ORDERS)


def subspace_data(model: LoadedModel, task: str, n_train: int, n_test: int, seed: int) -> SubspaceData:
    """Both sets; no answer of the one is an answer of the other."""
    if n_train < 2 or n_test < 2:
        raise InterpError(f"n_train={n_train} and n_test={n_test} must be at least 2")
    if task == POSITION:
        train, test = (position_pairs(model, n, seed, s) for n, s in ((n_train, "train"), (n_test, "test")))
        labels = [torch.tensor([name.startswith("ABBA") for name in pairs.templates]) for pairs in (train, test)]
    else:
        train, test = (
            make_pairs(model, task, n, seed, split=split) for n, split in ((n_train, "train"), (n_test, "test"))
        )
        labels = [torch.zeros(len(pairs), dtype=torch.bool) for pairs in (train, test)]
    return SubspaceData(train=train, test=test, train_label=labels[0], test_label=labels[1])


def shared_answers(data: SubspaceData) -> int:
    """Answer tokens that occur in both sets: what is learnt about them could be about the words."""
    both = [set(pairs.answers.flatten().tolist()) for pairs in (data.train, data.test)]
    return len(both[0] & both[1])


def random_data(model: LoadedModel, n: int) -> SubspaceData:
    """Pairs of random tokens, for models that cannot read."""
    train, test = (random_pairs(model, n=n, length=6, seed=seed) for seed in (0, 1))
    label = torch.arange(n) % 2 == 0
    return SubspaceData(train=train, test=test, train_label=label, test_label=label)
