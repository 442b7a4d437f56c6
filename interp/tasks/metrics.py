"""What is read off the logits of a prompt pair: one number per pair, differentiable.

A metric reads the last `n_last` positions and knows its pairs' answers; `rows` says which pair each row of the logits
belongs to, so that patched runs of any pair can be scored in any order. Averaging is the caller's.

    logit_diff   logit(right) - logit(wrong)
    prob         p(right)
    log_prob     log p(right), nats
    prob_diff    sum of p over the right answers - sum over the wrong ones
    kl           -KL(reference run || this run), nats: like the others, higher is nearer to the reference
Beware: the gradient of the KL is 0 at its reference, so shortcuts by gradients see nothing there (Syed et al. 2023,
https://arxiv.org/abs/2310.10348); a probability cannot fall below 0, so it hides components that work against the
answer where it is small already (Zhang and Nanda 2024, https://arxiv.org/abs/2309.16042).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.errors import InterpError, unknown

NAMES = ("logit_diff", "prob", "log_prob", "prob_diff", "kl")
Logits = Float[Tensor, "row last vocab"]
Rows = Int[Tensor, " row"]
Values = Float[Tensor, " row"]


@runtime_checkable
class Metric(Protocol):
    """One number per row of logits."""

    @property
    def name(self) -> str: ...

    @property
    def n_last(self) -> int:
        """How many positions, counted from the end, it reads."""
        ...

    def __call__(self, logits: Logits, rows: Rows) -> Values:
        """`logits`: the last `n_last` positions of each row; `rows`: its pair."""
        ...

    def take(self, rows: Sequence[int]) -> Metric:
        """The same of some of the pairs."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class AnswerMetric:
    """`logit_diff`, `prob` or `log_prob` of a right and a wrong answer, at the last position."""

    name: str
    answers: Int[Tensor, "pair 2"]
    n_last: int = 1

    def __post_init__(self) -> None:
        if self.name not in ("logit_diff", "prob", "log_prob"):
            raise unknown("metric of answers", self.name, ("logit_diff", "prob", "log_prob"))

    def __call__(self, logits: Logits, rows: Rows) -> Values:
        last, answers = logits[:, -1], self.answers.to(logits.device)[rows.to(logits.device)]
        if self.name == "logit_diff":
            right, wrong = last.gather(1, answers).unbind(1)
            return right - wrong
        found = last.log_softmax(-1).gather(1, answers[:, :1])[:, 0]
        return found if self.name == "log_prob" else found.exp()

    def take(self, rows: Sequence[int]) -> AnswerMetric:
        return AnswerMetric(name=self.name, answers=self.answers[list(rows)], n_last=self.n_last)


@dataclass(frozen=True, kw_only=True, eq=False)
class AnswerSets:
    """`prob_diff`: probability of all right answers less that of all wrong ones, at the last position."""

    right: Int[Tensor, "pair n_right"]
    """Token ids; -1 fills rows with fewer."""
    wrong: Int[Tensor, "pair n_wrong"]
    name: str = "prob_diff"
    n_last: int = 1

    def __call__(self, logits: Logits, rows: Rows) -> Values:
        p = logits[:, -1].softmax(-1)

        def total(ids: Tensor) -> Tensor:
            chosen = ids.to(p.device)[rows.to(p.device)]
            return (p.gather(1, chosen.clamp_min(0)) * (chosen >= 0)).sum(1)

        return total(self.right) - total(self.wrong)

    def take(self, rows: Sequence[int]) -> AnswerSets:
        index = list(rows)
        return AnswerSets(right=self.right[index], wrong=self.wrong[index], name=self.name, n_last=self.n_last)


@dataclass(frozen=True, kw_only=True, eq=False)
class Divergence:
    """`kl`: minus KL(reference || this), summed over the last positions, nats."""

    reference: Float[Tensor, "pair last vocab"]
    """Log-probabilities of the reference run."""
    name: str = "kl"

    @property
    def n_last(self) -> int:
        return self.reference.shape[1]

    def __call__(self, logits: Logits, rows: Rows) -> Values:
        p = self.reference.to(logits.device)[rows.to(logits.device)]
        return -(p.exp() * (p - logits[:, -self.n_last :].log_softmax(-1))).sum((-1, -2))

    def take(self, rows: Sequence[int]) -> Divergence:
        return Divergence(reference=self.reference[list(rows)], name=self.name)


@dataclass(frozen=True, kw_only=True, eq=False)
class UserMetric:
    """A function of your own: `function(logits (row, last, vocab), rows (row,)) -> (row,)`."""

    name: str
    function: Callable[[Tensor, Tensor], Tensor]
    n_last: int = 1
    chosen: Int[Tensor, " pair"] | None = None
    """Numbers of the pairs as the function knows them, after `take`."""

    def __call__(self, logits: Logits, rows: Rows) -> Values:
        found = self.function(logits, rows if self.chosen is None else self.chosen[rows.cpu()])
        if found.shape != rows.shape:
            raise InterpError(f"metric {self.name!r} gave shape {tuple(found.shape)}, expected {tuple(rows.shape)}")
        return found

    def take(self, rows: Sequence[int]) -> UserMetric:
        index = torch.tensor(list(rows))
        chosen = index if self.chosen is None else self.chosen[index]
        return UserMetric(name=self.name, function=self.function, n_last=self.n_last, chosen=chosen)
