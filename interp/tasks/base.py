"""Prompt pairs: a clean and a corrupted prompt that line up token by token, with the answers that tell them apart.

A task writes `Draft`s; `align` turns them into `PromptPairs` for one tokenizer. What cannot be aligned (unequal
lengths, an answer that is not one token) is dropped and counted, never padded. Prompts begin with the start token where
the model's tokenizer adds one, and a note says so: without it such a model (Gemma) cannot do the task.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from interp.core.errors import InterpError
from interp.core.hash import hash_tensors
from interp.instrument.tokens import TokenRecord, adds_start, tokenize
from interp.models.model import LoadedModel


@dataclass(frozen=True, kw_only=True)
class Draft:
    """One pair before tokenising."""

    clean: str
    corrupt: str
    right: str
    """Answer to the clean prompt, with its leading space."""
    wrong: str
    """Answer to the corrupted prompt."""
    roles: Mapping[str, int]
    """Name of a position -> first character of its word in the clean prompt; `END` is added for the last token."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptPairs:
    """Pairs of equal length, aligned token by token."""

    clean: TokenRecord
    corrupt: TokenRecord
    answers: Int[Tensor, "pair 2"]
    """Token ids: right for the clean prompt, right for the corrupted one."""
    roles: Mapping[str, Int[Tensor, " pair"]]
    n_dropped: int = 0
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.clean.ids.shape != self.corrupt.ids.shape:
            lengths = self.clean.ids.shape[1], self.corrupt.ids.shape[1]
            raise InterpError(f"the clean prompt has {lengths[0]} tokens, the corrupted one {lengths[1]}; align them")
        same = (self.clean.ids == self.corrupt.ids).all(dim=1)
        if bool(same.any()):
            raise InterpError(f"pair {int(same.nonzero()[0])} does not differ: nothing could be patched")

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def n_pos(self) -> int:
        return self.clean.ids.shape[1]

    @property
    def first_difference(self) -> int:
        """First position at which any pair differs: everything before it is shared."""
        return int((self.clean.ids != self.corrupt.ids).any(dim=0).nonzero()[0])

    @property
    def hash(self) -> str:
        return hash_tensors({"clean": self.clean.ids, "corrupt": self.corrupt.ids, "answers": self.answers})

    def label(self, pos: int) -> str:
        """A position as a reader knows it: its number, its role if all pairs agree on one, the first pair's token."""
        names = [name for name, where in self.roles.items() if bool((where == pos).all())]
        return f"{pos} {'/'.join(names) or self.clean.strings[0][pos].strip()}"

    def take(self, rows: Sequence[int]) -> PromptPairs:
        """Some of the pairs."""
        index = list(rows)
        return replace(
            self,
            clean=self.clean.rows(index),
            corrupt=self.corrupt.rows(index),
            answers=self.answers[index],
            roles={name: where[index] for name, where in self.roles.items()},
        )


def answer_token(model: LoadedModel, text: str) -> int | None:
    """The id of an answer that is exactly one token, else None."""
    ids = tokenize(model, [text]).ids[0]
    return int(ids[0]) if len(ids) == 1 else None


def align(model: LoadedModel, drafts: Sequence[Draft]) -> PromptPairs:
    """Pairs of the most common length whose answers are one token each; the rest is dropped and counted."""
    if not drafts:
        raise InterpError("no prompt pairs were given")
    kept: list[tuple[Draft, int, int, int]] = []
    reasons: Counter[str] = Counter()
    start = adds_start(model)
    for draft in drafts:
        lengths = [tokenize(model, [t], add_special=start).ids.shape[1] for t in (draft.clean, draft.corrupt)]
        right, wrong = answer_token(model, draft.right), answer_token(model, draft.wrong)
        if lengths[0] != lengths[1]:
            reasons[f"{lengths[0]} tokens against {lengths[1]}, e.g. {draft.clean!r} and {draft.corrupt!r}"] += 1
        elif right is None or wrong is None:
            reasons[f"an answer is not one token: {draft.right!r} or {draft.wrong!r}"] += 1
        else:
            kept.append((draft, lengths[0], right, wrong))
    if not kept:
        first, _ = reasons.most_common(1)[0]
        raise InterpError(f"none of {len(drafts)} prompt pairs can be aligned for this tokenizer: {first}")
    length = Counter(item[1] for item in kept).most_common(1)[0][0]
    same = [item for item in kept if item[1] == length]
    if len(same) < len(kept):
        reasons[f"another length than {length} tokens"] += len(kept) - len(same)
    return _pairs(model, same, reasons, start)


def _pairs(
    model: LoadedModel, kept: list[tuple[Draft, int, int, int]], reasons: Counter[str], start: bool
) -> PromptPairs:
    clean = tokenize(model, [item[0].clean for item in kept], add_special=start)
    corrupt = tokenize(model, [item[0].corrupt for item in kept], add_special=start)
    n_dropped = sum(reasons.values())
    roles = {
        name: torch.tensor([_position(clean, row, item[0].roles[name]) for row, item in enumerate(kept)])
        for name in kept[0][0].roles
    }
    return PromptPairs(
        clean=clean,
        corrupt=corrupt,
        answers=torch.tensor([[item[2], item[3]] for item in kept]),
        roles=roles | {"END": torch.full((len(kept),), clean.ids.shape[1] - 1)},
        n_dropped=n_dropped,
        notes=(
            *(("the prompts begin with the start token that this model's tokenizer adds",) if start else ()),
            *(f"{count} of {len(kept) + n_dropped} pairs dropped: {why}" for why, count in reasons.items()),
        ),
    )


def _position(record: TokenRecord, row: int, character: int) -> int:
    """The token that holds a character."""
    if record.spans is None:
        raise InterpError("this tokenizer gives no character spans; roles cannot be placed")
    begin, end = record.spans[row].unbind(-1)
    inside = ((begin <= character) & (character < end)).nonzero()
    if not len(inside):
        raise InterpError(f"no token holds character {character} of {record.texts and record.texts[row]!r}")
    return int(inside[0])


def pair(model: LoadedModel, clean: str, corrupt: str, right: str, wrong: str) -> PromptPairs:
    """One pair of the user's own. Raises InterpError naming both lengths, or the answer that is not one token."""
    return align(model, [Draft(clean=clean, corrupt=corrupt, right=right, wrong=wrong, roles={})])
