"""Prompt pairs: a clean and a corrupted prompt that line up token by token, with the answers that tell them apart.

A task writes `Draft`s; `align` turns them into `PromptPairs` for one tokenizer. Aligned means: as many tokens in both
prompts, every role at the same token in both, and each answer one token that continues the prompt without changing how
the prompt is split. What cannot be aligned is dropped and counted by reason, never padded. Prompts begin with the start
token where the model's tokenizer adds one, and a note says so: without it such a model (Gemma) cannot do the task.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.errors import InterpError
from interp.core.hash import hash_tensors
from interp.instrument.tokens import TokenRecord, adds_start, tokenize
from interp.models.model import LoadedModel
from interp.tasks.metrics import NAMES, AnswerMetric, AnswerSets, Divergence, Metric


@dataclass(frozen=True, kw_only=True)
class Draft:
    """One pair before tokenising."""

    clean: str
    corrupt: str
    right: str
    """Answer to the clean prompt, with its leading space."""
    wrong: str
    """Answer to the corrupted prompt, or the wrong one to compare with."""
    roles: Mapping[str, int]
    """Name of a position -> first character of its word in the clean prompt; `END` is added for the last token."""
    corrupt_roles: Mapping[str, int] = field(default_factory=dict[str, int])
    """The same in the corrupted prompt: a role that lies at another token there drops the pair."""
    also_wrong: tuple[str, ...] = ()
    """More wrong answers: the task is then measured by the probability of right less that of all wrong ones."""
    template: str = ""
    """Which sentence it was made from."""
    group: str = ""
    """What is to be balanced, e.g. `ABBA`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptPairs:
    """Pairs of equal length, aligned token by token."""

    clean: TokenRecord
    corrupt: TokenRecord
    answers: Int[Tensor, "pair 2"]
    """Token ids: right for the clean prompt; right for the corrupted one, or the wrong one to compare with."""
    roles: Mapping[str, Int[Tensor, " pair"]]
    n_dropped: int = 0
    notes: tuple[str, ...] = ()
    own: Metric | None = None
    """What the task is measured by, where that is not the logit difference of the answers."""
    templates: tuple[str, ...] = ()
    """Which sentence each pair was made from; empty where there are no sentences."""

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

    def metric(self, name: str = "", *, reference: Float[Tensor, "pair last vocab"] | None = None) -> Metric:
        """The task's own metric, or one of `metrics.NAMES`; `kl` needs the logits of the run to compare with."""
        if not name or (self.own is not None and name == self.own.name):
            return self.own or AnswerMetric(name="logit_diff", answers=self.answers)
        if name == "kl":
            if reference is None:
                raise InterpError("metric 'kl' needs the logits it compares with: metric('kl', reference=logits)")
            return Divergence(reference=reference.log_softmax(-1))
        if name == "prob_diff":
            return AnswerSets(right=self.answers[:, :1], wrong=self.answers[:, 1:])
        if name not in NAMES:
            raise unknown_metric(name, self.own)
        return AnswerMetric(name=name, answers=self.answers)

    def take(self, rows: Sequence[int]) -> PromptPairs:
        """Some of the pairs."""
        index = list(rows)
        return replace(
            self,
            clean=self.clean.rows(index),
            corrupt=self.corrupt.rows(index),
            answers=self.answers[index],
            roles={name: where[index] for name, where in self.roles.items()},
            own=None if self.own is None else self.own.take(index),
            templates=tuple(self.templates[row] for row in index) if self.templates else (),
        )


def unknown_metric(name: str, own: Metric | None) -> InterpError:
    """An unknown metric, with those that these pairs have."""
    known = (*NAMES, *(() if own is None or own.name in NAMES else (own.name,)))
    return InterpError(f"unknown metric {name!r}; these pairs have {', '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A draft that fits a tokenizer."""

    draft: Draft
    length: int
    right: int
    wrong: int
    also_wrong: tuple[int, ...]
    positions: Mapping[str, int]


class Drops:
    """How many pairs were dropped, by reason, with the first example of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def add(self, reason: str, example: str, count: int = 1) -> None:
        self.counts[reason] += count
        self._examples.setdefault(reason, example)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def described(self, reason: str) -> str:
        example = self._examples[reason]
        return f"{reason}, e.g. {example}" if example else reason

    def notes(self, n_kept: int) -> tuple[str, ...]:
        of = n_kept + self.total
        return tuple(f"{n} of {of} pairs dropped: {self.described(why)}" for why, n in self.counts.items())

    def error(self) -> InterpError:
        worst, _ = self.counts.most_common(1)[0]
        return InterpError(
            f"none of {self.total} prompt pairs can be aligned for this tokenizer: {self.described(worst)}"
        )


def _short(text: str, width: int = 90) -> str:
    """A text as it is quoted in a note."""
    return repr(text if len(text) <= width else f"{text[: width // 2]} ... {text[-width // 2 :]}")


def answer_token(model: LoadedModel, text: str, answer: str) -> int | None:
    """The id of an answer that continues a text as exactly one token, else None."""
    before, after = (tokenize(model, [t]).ids[0].tolist() for t in (text, text + answer))
    return int(after[-1]) if after[:-1] == before else None


def fit(model: LoadedModel, draft: Draft, drops: Drops) -> Fitted | None:
    """A draft in tokens; None, and counted, if it cannot be aligned."""
    start = adds_start(model)
    clean, corrupt = (tokenize(model, [text], add_special=start) for text in (draft.clean, draft.corrupt))
    shown = f"{_short(draft.clean)} and {_short(draft.corrupt)}"
    answers = [answer_token(model, draft.clean, text) for text in (draft.right, draft.wrong, *draft.also_wrong)]
    known = [token for token in answers if token is not None]
    if len(known) < len(answers):
        split = (draft.right, draft.wrong, *draft.also_wrong)[answers.index(None)]
        drops.add("an answer is not one token", f"{split!r} after {_short(draft.clean)}")
        return None
    if known[0] in known[1:]:
        drops.add("right and wrong answer are the same token", f"{draft.right!r} and {draft.wrong!r}")
        return None
    lengths = clean.ids.shape[1], corrupt.ids.shape[1]
    if lengths[0] != lengths[1]:
        drops.add("unequal lengths", f"{lengths[0]} tokens against {lengths[1]}: {shown}")
        return None
    if bool((clean.ids == corrupt.ids).all()):
        drops.add("the corruption changes nothing", shown)
        return None
    positions = {name: _position(clean, at) for name, at in draft.roles.items()}
    for name, at in draft.corrupt_roles.items():
        if (there := _position(corrupt, at)) != positions[name]:
            drops.add("a role lies at another token", f"{name} at {positions[name]} against {there}: {shown}")
            return None
    right, wrong, *more = known
    return Fitted(
        draft=draft, length=lengths[0], right=right, wrong=wrong, also_wrong=tuple(more), positions=positions
    )  # fmt: skip


def align(model: LoadedModel, drafts: Sequence[Draft]) -> PromptPairs:
    """Pairs of the most common length whose answers are one token each; the rest is dropped and counted."""
    if not drafts:
        raise InterpError("no prompt pairs were given")
    drops = Drops()
    kept = [found for draft in drafts if (found := fit(model, draft, drops)) is not None]
    if not kept:
        raise drops.error()
    length = Counter(item.length for item in kept).most_common(1)[0][0]
    same = [item for item in kept if item.length == length]
    if len(same) < len(kept):
        drops.add(f"another length than {length} tokens", "", len(kept) - len(same))
    return assemble(model, same, drops)


def assemble(model: LoadedModel, kept: Sequence[Fitted], drops: Drops, notes: Sequence[str] = ()) -> PromptPairs:
    """Pairs of drafts of one length."""
    start = adds_start(model)
    names = kept[0].draft.roles
    return PromptPairs(
        clean=tokenize(model, [item.draft.clean for item in kept], add_special=start),
        corrupt=tokenize(model, [item.draft.corrupt for item in kept], add_special=start),
        answers=torch.tensor([[item.right, item.wrong] for item in kept]),
        roles={name: torch.tensor([item.positions[name] for item in kept]) for name in names}
        | {"END": torch.full((len(kept),), kept[0].length - 1)},
        n_dropped=drops.total,
        notes=(
            *(("the prompts begin with the start token that this model's tokenizer adds",) if start else ()),
            *drops.notes(len(kept)),
            *notes,
        ),
        own=_against_all(kept),
        templates=tuple(item.draft.template for item in kept) if any(item.draft.template for item in kept) else (),
    )


def _against_all(kept: Sequence[Fitted]) -> AnswerSets | None:
    """Right against several wrong answers, where a draft has several."""
    rows = [(item.wrong, *item.also_wrong) for item in kept]
    width = max(map(len, rows))
    if width == 1:
        return None
    wrong = torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows])
    return AnswerSets(right=torch.tensor([[item.right] for item in kept]), wrong=wrong)


def _position(record: TokenRecord, character: int) -> int:
    """The token of a single text that holds a character."""
    if record.spans is None:
        raise InterpError("this tokenizer gives no character spans; roles cannot be placed")
    begin, end = record.spans[0].unbind(-1)
    inside = ((begin <= character) & (character < end)).nonzero()
    if not len(inside):
        raise InterpError(f"no token holds character {character} of {record.texts and record.texts[0]!r}")
    return int(inside[0])


def pair(model: LoadedModel, clean: str, corrupt: str, right: str, wrong: str) -> PromptPairs:
    """One pair of the user's own. Raises InterpError naming both lengths, or the answer that is not one token."""
    return align(model, [Draft(clean=clean, corrupt=corrupt, right=right, wrong=wrong, roles={})])
