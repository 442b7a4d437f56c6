"""The tasks, prompt pairs of any of them, and whether a model can do one.

    accuracy = share of the clean prompts that the model gets right
Right means that the task's own metric is above 0 there: the right answer is likelier than the wrong one, or than all
wrong ones together. `top1` counts prompts whose likeliest next token of all is the right answer. Intervals are those of
a proportion (E. Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953): they stay inside 0..1 and are not empty
at 0 or n right.
Beware: a circuit for a task that the model cannot do explains nothing, so `check_accuracy` comes before any circuit.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch

from interp import tasks as folder
from interp.core.controls import Interval
from interp.core.errors import InterpError, unknown
from interp.models.model import LoadedModel
from interp.tasks.base import PromptPairs
from interp.tasks.task import Task

ROWS = 16
"""Prompts per forward while measuring accuracy."""
MIN_ACCURACY = 0.9
"""Below it no claim about a circuit is made (the papers' circuits are of tasks done nearly always)."""


def _find() -> dict[str, Task]:
    found: dict[str, Task] = {}
    for info in pkgutil.iter_modules(folder.__path__):
        task = getattr(importlib.import_module(f"{folder.__name__}.{info.name}"), "TASK", None)
        if isinstance(task, Task):
            found[task.name] = task
    return dict(sorted(found.items()))


TASKS = _find()
"""Every task by name: each file of this folder that has a `TASK`."""


def find_task(name: str) -> Task:
    """A task by its name."""
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]


def make_pairs(
    model: LoadedModel, task: str, n: int = 32, seed: int = 0, corruption: str = "", split: str = "train"
) -> PromptPairs:
    """`n` prompt pairs of a task; a note says why where there are fewer. Equal arguments give equal pairs."""
    return find_task(task).pairs(model, n, seed, corruption, split)


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How often a model is right on the clean prompts."""

    n_right: int
    n: int
    n_top1: int
    """Prompts whose likeliest next token is the right answer."""
    right: tuple[bool, ...]
    """Of each prompt."""

    @property
    def interval(self) -> Interval:
        return wilson(self.n_right, self.n)

    @property
    def top1(self) -> Interval:
        return wilson(self.n_top1, self.n)

    def __str__(self) -> str:
        share = self.interval
        return (
            f"{self.n_right} of {self.n} prompts right ({share.estimate:.0%}, "
            f"95 % interval {share.low:.0%} to {share.high:.0%})"
        )


def wilson(n_right: int, n: int, level: float = 0.95) -> Interval:
    """Interval of a proportion: the shares p with |n_right/n - p| <= z sqrt(p (1-p) / n)."""
    if not 0 <= n_right <= n or n < 1:
        raise InterpError(f"{n_right} right of {n} is no proportion")
    z, p = NormalDist().inv_cdf((1 + level) / 2), n_right / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Interval(estimate=p, low=max(0.0, centre - half), high=min(1.0, centre + half), level=level)


@torch.no_grad()
def accuracy(model: LoadedModel, pairs: PromptPairs) -> Accuracy:
    """How often the model is right on the clean prompts."""
    metric = pairs.metric()
    right: list[bool] = []
    n_top1 = 0
    for start in range(0, len(pairs), ROWS):
        rows = torch.arange(start, min(start + ROWS, len(pairs)))
        logits = model(pairs.clean.rows(rows.tolist()))[:, -metric.n_last :].float().cpu()
        right += (metric(logits, rows) > 0).tolist()
        n_top1 += int((logits[:, -1].argmax(-1) == pairs.answers[rows, 0]).sum())
    return Accuracy(n_right=sum(right), n=len(pairs), n_top1=n_top1, right=tuple(right))


def check_accuracy(model: LoadedModel, pairs: PromptPairs, min_accuracy: float = MIN_ACCURACY) -> Accuracy:
    """The accuracy; an InterpError with its interval where it is below `min_accuracy`."""
    found = accuracy(model, pairs)
    if found.interval.estimate < min_accuracy:
        raise InterpError(
            f"{model.source}: {found}, below min_accuracy={min_accuracy:g}; a circuit of a task that the model cannot "
            "do explains nothing: take a larger model or another task, or lower min_accuracy"
        )
    return found


def by_template(pairs: PromptPairs, values: Sequence[float]) -> dict[str, float]:
    """Mean of one value per pair over the pairs of each sentence."""
    if len(values) != len(pairs) or len(pairs.templates) != len(pairs):
        raise InterpError(f"{len(values)} values for {len(pairs)} pairs of {len(pairs.templates)} known sentences")
    groups: dict[str, list[float]] = {}
    for template, value in zip(pairs.templates, values, strict=True):
        groups.setdefault(template, []).append(float(value))
    return {template: sum(found) / len(found) for template, found in groups.items()}
