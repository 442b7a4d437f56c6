"""In-context classification: does a model label an item by the examples before it, or by what it learnt of its class?

    x_1 l_1 x_2 l_2 ... x_N l_N x  ->  label of x        items and labels are tokens, from two parts of the vocabulary
Classes follow Zipf's law, p_k ~ k^(-alpha). A *bursty* row has N/B classes, each B times, and asks for one of them, so
that its context answers; other rows draw every item on its own. A row with *fresh* labels gives each of its classes a
random label, so that only the context answers; other rows use the fixed one, k mod n_labels, so that weights do too.
    labels   the labels of the class asked for and of another change places: the answer becomes the other label
    query    the last item becomes another class's: the answer becomes that class's label
Prompt pairs are bursty with fresh labels. Roles: ITEM, LABEL (last example of the class asked for), END.
Papers: S. Chan et al., Data distributional properties drive emergent in-context learning, 2022,
https://arxiv.org/abs/2205.05055; G. Reddy, The mechanistic basis of data dependence and abrupt learning, 2024,
https://arxiv.org/abs/2312.03002 (its items are noisy vectors; here a class may have several tokens, `n_exemplars`).
Beware: with several tokens per class an example may not match the item asked for, and an untrained model cannot know.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import InterpError
from interp.core.seed import torch_generator
from interp.models.model import LoadedModel
from interp.tasks.base import PromptPairs
from interp.tasks.sequences import from_sequences, ordinary
from interp.tasks.task import Request, Task


@dataclass(frozen=True, kw_only=True)
class ClassLaw:
    """How rows are drawn."""

    n_examples: int = 8
    """Item-label pairs before the item asked for."""
    copies: int = 2
    """B: how often each class of a bursty row occurs."""
    n_classes: int = 32
    n_labels: int = 16
    n_exemplars: int = 1
    """Tokens of each class; an item is one of them at random."""
    alpha: float = 1.0
    """Exponent of Zipf's law; 0 makes all classes equally frequent."""
    p_bursty: float = 1.0
    p_fresh: float = 1.0

    def __post_init__(self) -> None:
        if self.n_examples < 1 or self.copies < 1 or self.n_examples % self.copies:
            raise InterpError(f"copies={self.copies} must divide n_examples={self.n_examples}")
        if self.n_distinct > min(self.n_classes, self.n_labels):
            raise InterpError(
                f"{self.n_distinct} classes in a row need as many of n_classes={self.n_classes} and "
                f"n_labels={self.n_labels}"
            )
        if not (0 <= self.p_bursty <= 1 and 0 <= self.p_fresh <= 1 and self.alpha >= 0 and self.n_exemplars >= 1):
            raise InterpError("p_bursty and p_fresh must lie in 0..1, alpha at least 0, n_exemplars at least 1")

    @property
    def n_distinct(self) -> int:
        """Classes of a bursty row."""
        return self.n_examples // self.copies

    @property
    def n_tokens(self) -> int:
        return self.n_labels + self.n_classes * self.n_exemplars

    @property
    def frequencies(self) -> Float[Tensor, " cls"]:
        """Probability of each class."""
        weights = torch.arange(1, self.n_classes + 1, dtype=torch.float64) ** -self.alpha
        return weights / weights.sum()


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassRows:
    """Rows of examples. Labels are token ids 0 .. n_labels - 1; the items come after them, class by class."""

    ids: Int[Tensor, "row pos"]
    """x_1 l_1 ... x_N l_N x."""
    label: Int[Tensor, " row"]
    """The label of the item asked for."""
    classes: Int[Tensor, "row example"]
    """Class of each example."""
    asked: Int[Tensor, " row"]
    """Class of the item asked for."""
    bursty: Bool[Tensor, " row"]
    fresh: Bool[Tensor, " row"]


def class_rows(law: ClassLaw, n: int, *, generator: torch.Generator) -> ClassRows:
    """`n` rows."""
    p = law.frequencies
    bursty = torch.rand(n, generator=generator) < law.p_bursty
    fresh = torch.rand(n, generator=generator) < law.p_fresh
    few = torch.multinomial(p.expand(n, -1), law.n_distinct, replacement=False, generator=generator)
    copies = few.repeat(1, law.copies)
    order = torch.stack([torch.randperm(law.n_examples, generator=generator) for _ in range(n)])
    single = torch.multinomial(p, n * (law.n_examples + 1), replacement=True, generator=generator).view(n, -1)
    one_of = few.gather(1, torch.randint(law.n_distinct, (n, 1), generator=generator))[:, 0]
    classes = torch.where(bursty[:, None], copies.gather(1, order), single[:, :-1])
    asked = torch.where(bursty, one_of, single[:, -1])
    fixed = (torch.arange(law.n_classes) % law.n_labels).expand(n, -1)
    labels = torch.where(fresh[:, None], _fresh_labels(law, classes, asked, generator), fixed)
    shown = torch.cat([classes, asked[:, None]], dim=1)
    exemplar = torch.randint(law.n_exemplars, shown.shape, generator=generator)
    items = law.n_labels + shown * law.n_exemplars + exemplar
    written = torch.stack([items, labels.gather(1, shown)], dim=-1).flatten(1)[:, :-1]
    return ClassRows(
        ids=written, label=labels.gather(1, asked[:, None])[:, 0], classes=classes, asked=asked, bursty=bursty,
        fresh=fresh,
    )  # fmt: skip


def _fresh_labels(
    law: ClassLaw, classes: Int[Tensor, "row example"], asked: Int[Tensor, " row"], generator: torch.Generator
) -> Int[Tensor, "row cls"]:
    """A random label for each class; the classes of one row get different ones while there are enough."""
    labels = torch.zeros(len(classes), law.n_classes, dtype=torch.long)
    for row, shown in enumerate(torch.cat([classes, asked[:, None]], dim=1)):
        present = shown.unique()
        order = torch.randperm(law.n_labels, generator=generator)
        labels[row, present] = order[torch.arange(len(present)) % law.n_labels]
    return labels


def classification_pairs(model: LoadedModel, request: Request, law: ClassLaw | None = None) -> PromptPairs:
    """Pairs of bursty rows with fresh labels."""
    law = law or ClassLaw()
    if law.n_distinct < 2 or (law.p_bursty, law.p_fresh) != (1.0, 1.0):
        raise InterpError("prompt pairs need two classes or more in a row, p_bursty=1 and p_fresh=1")
    pool, n = ordinary(model, law.n_tokens), request.n
    generator = torch_generator(request.seed, "classification", request.split)
    pool = pool[torch.randperm(len(pool), generator=generator)[: law.n_tokens]]
    rows = class_rows(law, n, generator=generator)
    different = (rows.classes != rows.asked[:, None]).double()
    other = torch.multinomial(different, 1, generator=generator)
    other_label = rows.ids.gather(1, 2 * other + 1)
    last = torch.where(different == 0, torch.arange(law.n_examples), -1).amax(dim=1)
    corrupt = rows.ids.clone()
    if request.corruption == "labels":
        labels = rows.ids[:, 1::2]
        swapped = torch.where(labels == rows.label[:, None], other_label, labels)
        corrupt[:, 1::2] = torch.where(labels == other_label, rows.label[:, None], swapped)
    else:
        corrupt[:, -1:] = rows.ids.gather(1, 2 * other)
    return from_sequences(
        model,
        pool[rows.ids],
        pool[corrupt],
        pool[torch.stack([rows.label, other_label[:, 0]], dim=1)],
        {"ITEM": 2 * last, "LABEL": 2 * last + 1},
    )


TASK = Task(
    name="classification",
    question="Does the model label an item by the examples before it?",
    example="cat 3 dog 7 dog 7 cat 3 dog -> 7",
    corruptions={
        "labels": "the labels of the class asked for and of another change places (the answer becomes the other)",
        "query": "the last item becomes another class's (the answer becomes that class's label)",
    },
    roles={
        "ITEM": "last example of the class asked for",
        "LABEL": "its label: the answer",
        "END": "the item asked for",
    },
    make=classification_pairs,
    words=False,
    paper="https://arxiv.org/abs/2205.05055",
)
