"""What a task is, and how prompt pairs are drawn for it until there are as many as were asked for.

Every task is one file that ends with a constant `TASK`; `library` finds them. A task that is written in words makes
`Draft`s one by one; `draw_pairs` fits each to the tokenizer and goes on until one length of prompt has enough of them,
each group (ABBA and BABA, he and she) its equal share. Words and sentences of the split `test` never occur in `train`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import TypeVar

import torch

from interp.core.errors import InterpError, unknown
from interp.core.seed import torch_generator
from interp.models.model import LoadedModel
from interp.tasks.base import Draft, Drops, Fitted, PromptPairs, assemble, fit

Item = TypeVar("Item")

SPLITS = ("train", "test")
EVERY = 3
"""Every third word of a list, and every third sentence, is kept for the test split."""
ATTEMPTS, HOPELESS = 40, 120
"""Drafts tried for each pair asked for before fewer are given; drafts in all before giving up on none."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of a task."""

    n: int
    seed: int
    corruption: str
    split: str


Make = Callable[[LoadedModel, Request], PromptPairs]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task: what it asks, what its corruptions do, what its positions are called."""

    name: str
    question: str
    example: str
    """A clean prompt -> its answer."""
    corruptions: Mapping[str, str]
    """Name -> what it changes; the first is the default."""
    roles: Mapping[str, str]
    """Name -> which token; every task has END, the last."""
    make: Make
    metric: str = "logit_diff"
    """What it is measured by if nothing else is asked for."""
    words: bool = True
    """Written in words, so that the model has to read; else made of tokens of any vocabulary."""
    paper: str = ""

    @property
    def default_corruption(self) -> str:
        return next(iter(self.corruptions))

    def pairs(
        self, model: LoadedModel, n: int, seed: int = 0, corruption: str = "", split: str = "train"
    ) -> PromptPairs:
        """`n` pairs; a note says so where there are fewer."""
        chosen = corruption or self.default_corruption
        if chosen not in self.corruptions:
            raise unknown(f"corruption of {self.name}", chosen, self.corruptions)
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        if n < 1:
            raise InterpError(f"n={n} prompt pairs; ask for at least 1")
        if self.words and model.tokenizer is None:
            raise InterpError(f"{model.source} has no tokenizer, and {self.name} is written in words")
        return self.make(model, Request(n=n, seed=seed, corruption=chosen, split=split))


def held_out(items: Sequence[Item], split: str) -> tuple[Item, ...]:
    """The items of a split: every third one is for `test`."""
    return tuple(item for number, item in enumerate(items) if (number % EVERY == EVERY - 1) == (split == "test"))


class Picker:
    """Random choices from one generator."""

    def __init__(self, seed: int, *labels: str) -> None:
        self.generator = torch_generator(seed, *labels)

    def one(self, items: Sequence[Item]) -> Item:
        return items[int(torch.randint(len(items), (1,), generator=self.generator))]

    def some(self, items: Sequence[Item], k: int) -> list[Item]:
        """`k` different ones, in random order."""
        if k > len(items):
            raise InterpError(f"{k} different ones asked for, of {len(items)}: {items!r:.100}")
        return [items[i] for i in torch.randperm(len(items), generator=self.generator)[:k].tolist()]


def fill(template: str, words: Mapping[str, str]) -> tuple[str, dict[str, int]]:
    """A template's `{SLOT}`s filled in; the first character of each slot's word, at its first occurrence."""
    text, places = "", dict[str, int]()
    for literal, slot, _, _ in Formatter().parse(template):
        text += literal
        if slot is not None:
            places.setdefault(slot, len(text))
            text += words[slot]
    return text, places


def draw_pairs(
    model: LoadedModel,
    request: Request,
    label: str,
    draft: Callable[[Picker, str], Draft],
    groups: Sequence[str] = ("",),
) -> PromptPairs:
    """`n` different pairs of one length, each group its equal share; fewer with a note.

    draft: makes one pair of a group. label: of the random numbers; the split is part of it.
    """
    pick = Picker(request.seed, label, request.split)
    share = {group: (request.n + len(groups) - 1 - i) // len(groups) for i, group in enumerate(groups)}
    drops, seen = Drops(), set[str]()
    fitted: dict[int, dict[str, list[Fitted]]] = defaultdict(lambda: defaultdict(list))
    best: list[Fitted] = []
    batch = max(request.n, 8)
    for start in range(0, ATTEMPTS * batch, batch):
        n_seen = len(seen)
        for number in range(start, start + batch):
            made = draft(pick, groups[number % len(groups)])
            if made.clean in seen:
                continue
            seen.add(made.clean)
            if (found := fit(model, made, drops)) is not None:
                fitted[found.length][made.group].append(found)
        best = max((_shares(by_group, share) for by_group in fitted.values()), key=len, default=[])
        if len(best) == request.n or len(seen) == n_seen or (not best and start + batch >= HOPELESS):
            break
    if not best:
        raise drops.error() if drops.total else InterpError(f"{label}: no group of prompts of one length; ask for more")
    others = sum(len(_shares(found, share)) for length, found in fitted.items() if length != best[0].length)
    if others:
        drops.add(f"another length than {best[0].length} tokens", "", others)
    notes = [] if len(best) == request.n else [f"{len(best)} pairs instead of {request.n}: no more of one length found"]
    return assemble(model, best, drops, notes)


def _shares(by_group: Mapping[str, Sequence[Fitted]], share: Mapping[str, int]) -> list[Fitted]:
    """The groups in turn, each up to its share and none more than one ahead of another."""
    shortest = min(len(by_group.get(group, ())) for group in share)
    taken = [by_group.get(group, ())[: min(wanted, shortest + 1)] for group, wanted in share.items()]
    return [found[i] for i in range(max(map(len, taken))) for found in taken if i < len(found)]
