"""Greater-than: does a model know that an end comes after its beginning?

"The war lasted from the year 1732 to the year 17" -> a year of the century above 32, with Y the two digits of the start
    prob_diff = P(year > Y) - P(year <= Y)
Where the tokenizer writes the last two digits as one token, P is read off the next token. Where each digit is a token
(SmolLM2, Gemma), the first digit D of Y is given to the model as the next token, so that one forward has both steps,
    P(year > Y) = P(decade > D) + P(decade = D) P(unit > U | D)        Y = 10 D + U
and the prompts end in D. Other splits (three digits and one) are dropped.
    01     the start becomes the year 01 of the century: the model should not hold back any year
    other  the start becomes another year of the century
Roles: YY (last digits of the start; YY+1 its unit where digits are tokens), END.
Papers: M. Hanna et al., How does GPT-2 compute greater-than?, 2023, https://arxiv.org/abs/2305.00586; two steps: A.
Mueller et al., MIB, 2025, https://arxiv.org/abs/2504.13151.
Beware: the probabilities are of all tokens, not of years only. `answers` are Y + 1 (or its unit) and Y: the nearest
right and wrong year, so their logit difference tells less than the task's own metric.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from interp.core.errors import InterpError
from interp.instrument.tokens import tokenize
from interp.models.model import LoadedModel
from interp.tasks.base import Draft, PromptPairs, answer_token
from interp.tasks.metrics import Logits, Rows, Values
from interp.tasks.task import Picker, Request, Task, draw_pairs, fill, held_out

TEMPLATES = (
    "The {NOUN} lasted from the year {CENTURY}{YY} to the year {CENTURY}",
    "The {NOUN} continued from the year {CENTURY}{YY} until the year {CENTURY}",
    "The {NOUN} ran from the year {CENTURY}{YY} to the year {CENTURY}",
)
NOUNS = (
    "war", "siege", "voyage", "project", "reign", "conflict", "dispute", "study", "trial", "program", "strike",
    "festival", "journey", "campaign", "rebellion", "tour", "marriage", "career", "experiment", "drought", "plague",
    "famine", "search", "operation", "alliance", "negotiation", "construction", "exhibition", "investigation",
    "mission",
)  # fmt: skip
CENTURIES = range(11, 18)
YEARS = range(2, 99)
FIRST = 1
"""Year of the default corruption."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GreaterThan:
    """P(year > Y) - P(year <= Y); with `tokens` of ten digits over the last two positions, of a hundred over one."""

    years: Int[Tensor, " pair"]
    """Y."""
    tokens: Int[Tensor, " number"]
    """Id of each digit 0-9, or of each two digits 00-99; -1 for one that is no single token."""
    name: str = "prob_diff"

    @property
    def n_last(self) -> int:
        return 2 if len(self.tokens) == 10 else 1

    def __call__(self, logits: Logits, rows: Rows) -> Values:
        tokens, years = self.tokens.to(logits.device), self.years.to(logits.device)[rows.to(logits.device)]
        p = logits[:, -self.n_last :].softmax(-1)[..., tokens.clamp_min(0)] * (tokens >= 0)
        number = torch.arange(len(tokens), device=logits.device)

        def difference(p: Tensor, than: Tensor) -> Tensor:
            """P(number > than) - P(number < than)."""
            return (p * torch.sign(number - than[:, None])).sum(-1)

        if self.n_last == 1:
            return difference(p[:, 0], years) - p[:, 0].gather(1, years[:, None])[:, 0]
        decade, unit = years[:, None] // 10, years[:, None] % 10
        second = difference(p[:, 1], unit[:, 0]) - p[:, 1].gather(1, unit)[:, 0]
        return difference(p[:, 0], decade[:, 0]) + p[:, 0].gather(1, decade)[:, 0] * second

    def take(self, rows: Sequence[int]) -> GreaterThan:
        return replace(self, years=self.years[list(rows)])


def written_as(model: LoadedModel) -> tuple[int, Int[Tensor, " number"]]:
    """Tokens per two digits, and the tokens: one each for `0`-`9` (2) or for `00`-`99` (1)."""
    before = fill(TEMPLATES[0], {"NOUN": "war", "CENTURY": "17", "YY": "32"})[0]
    for n_digits, names in ((1, [str(i) for i in range(10)]), (2, [f"{i:02d}" for i in range(100)])):
        found = [answer_token(model, before, name) for name in names]
        if sum(token is not None for token in found) > 0.9 * len(found):
            one_more = len(tokenize(model, [before + "32"]).ids[0]) - len(tokenize(model, [before]).ids[0])
            if one_more == 3 - n_digits:
                return one_more, torch.tensor([-1 if token is None else token for token in found])
    shown = tokenize(model, [before + "32"]).strings[0][-3:]
    raise InterpError(
        f"greater-than needs the last two digits of a year as one token or as two; {model.source} writes "
        f"1732 with {', '.join(map(repr, shown))} at its end"
    )


def random_draft(pick: Picker, *, n_tokens: int, corruption: str, split: str) -> Draft:
    """One pair; `n_tokens` for the last two digits."""
    number = pick.one(held_out(range(len(TEMPLATES)), split))
    year = pick.one([y for y in YEARS if n_tokens == 1 or y % 10 < 9])
    other = FIRST if corruption == "01" else pick.one([y for y in YEARS if y != year])
    words = {"NOUN": pick.one(held_out(NOUNS, split)), "CENTURY": str(pick.one(CENTURIES)), "YY": f"{year:02d}"}
    (clean, at), (corrupt, there) = (fill(TEMPLATES[number], words | {"YY": f"{y:02d}"}) for y in (year, other))
    if n_tokens == 2:
        clean, corrupt = clean + words["YY"][0], corrupt + words["YY"][0]
    answers = [f"{y:02d}" if n_tokens == 1 else f"{y % 10}" for y in (year + 1, year)]
    digits = {"YY": 0, "YY+1": 1} if n_tokens == 2 else {"YY": 0}
    return Draft(
        clean=clean,
        corrupt=corrupt,
        right=answers[0],
        wrong=answers[1],
        roles={role: at["YY"] + shift for role, shift in digits.items()},
        corrupt_roles={role: there["YY"] + shift for role, shift in digits.items()},
        template=str(number),
    )


def make(model: LoadedModel, request: Request) -> PromptPairs:
    """Random nouns, centuries and years, with the task's own metric."""
    n_tokens, tokens = written_as(model)

    def one(pick: Picker, _: str) -> Draft:
        return random_draft(pick, n_tokens=n_tokens, corruption=request.corruption, split=request.split)

    pairs = draw_pairs(model, request, "greater-than", one)
    years = torch.tensor([_year(text) for text in pairs.clean.texts or ()])
    note = "the prompts end in the first digit of the start: the two digits are read in two steps"
    return replace(
        pairs,
        own=GreaterThan(years=years, tokens=tokens),
        notes=(*pairs.notes, note) if n_tokens == 2 else pairs.notes,
    )


def _year(text: str) -> int:
    found = re.search(r"\d{4}", text)
    assert found is not None
    return int(found[0]) % 100


TASK = Task(
    name="greater-than",
    question="Does the model know that an end comes after its beginning?",
    example="The war lasted from the year 1732 to the year 17 -> 33 to 99",
    corruptions={
        "01": "the start becomes the first year of the century (no year is held back)",
        "other": "the start becomes another year of the century",
    },
    roles={
        "YY": "last two digits of the start, or the first of them",
        "YY+1": "the second of them, where each digit is a token",
        "END": "the last token",
    },
    make=make,
    metric="prob_diff",
    paper="https://arxiv.org/abs/2305.00586",
)
