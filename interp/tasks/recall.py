"""Multi-query associative recall (MQAR): which value belongs to a key, when many pairs were given and many are asked?

    k_1 v_1 ... k_n v_n  . . k_3 . k_1 . . . k_2  ->  v_2        keys and values from two halves of the tokens
Each key is asked once after the pairs, at slots whose distance follows the power law p ~ x^(a-1) (a = 0.01: most soon,
some late), with a filler token between. The value is the label at the query and is never written after it.
    values   the value of the last key asked and that of another change places: the answer becomes the other value
    query    the last token becomes another key: the answer becomes that key's value
Roles: KEY, VALUE (of the last key asked, among the pairs), END (where it is asked).
Source: S. Arora et al., Zoology, 2023, https://arxiv.org/abs/2312.04927 (keys without repetition in a row).
Beware: fillers drawn from all tokens (`random_filler`) may repeat a key, with another token after it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from interp.core.errors import InterpError
from interp.core.seed import torch_generator
from interp.models.model import LoadedModel
from interp.tasks.base import PromptPairs
from interp.tasks.sequences import distinct, from_sequences, ordinary
from interp.tasks.task import Request, Task

N_KEYS, LENGTH, POWER = 4, 24, 0.01
NO_LABEL = -100
"""What losses leave out."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Recall:
    """Rows of pairs and queries."""

    ids: Int[Tensor, "row pos"]
    labels: Int[Tensor, "row pos"]
    """The value at each query, -100 elsewhere."""
    keys: Int[Tensor, "row key"]
    values: Int[Tensor, "row key"]
    queries: Int[Tensor, "row key"]
    """Position at which each key is asked."""


def recall_rows(
    pool: Int[Tensor, " token"],
    n: int,
    *,
    n_keys: int = N_KEYS,
    length: int = LENGTH,
    power: float = POWER,
    random_filler: bool = False,
    generator: torch.Generator,
) -> Recall:
    """`n` rows that end at a query. pool: its first token is the filler, the rest is halved into keys and values."""
    if length < 4 * n_keys or n_keys < 2:
        raise InterpError(f"{n_keys} keys need at least {4 * max(n_keys, 2)} tokens, two per pair and two per query")
    half = (len(pool) - 1) // 2
    if half < n_keys:
        raise InterpError(f"{n_keys} keys and values need {2 * n_keys + 1} different tokens, got {len(pool)}")
    keys = distinct(pool[1 : 1 + half], n, n_keys, generator)
    values = distinct(pool[1 + half :], n, n_keys, generator)
    n_slots = (length - 2 * n_keys + 1) // 2
    weights = torch.arange(1, n_slots, dtype=torch.float64) ** (power - 1)
    slots = torch.multinomial(weights.expand(n, -1), n_keys - 1, replacement=False, generator=generator)
    slots = torch.cat([slots, torch.full((n, 1), n_slots - 1)], dim=1)
    order = torch.stack([torch.randperm(n_keys, generator=generator) for _ in range(n)])
    queries = 2 * n_keys + 2 * torch.empty_like(slots).scatter(1, order, slots)
    ids = torch.full((n, 2 * n_keys + 2 * n_slots - 1), int(pool[0]))
    if random_filler:
        ids = pool[torch.randint(len(pool), ids.shape, generator=generator)]
    ids[:, : 2 * n_keys] = torch.stack([keys, values], dim=-1).flatten(1)
    return Recall(
        ids=ids.scatter(1, queries, keys),
        labels=torch.full_like(ids, NO_LABEL).scatter(1, queries, values),
        keys=keys,
        values=values,
        queries=queries,
    )


def recall_pairs(
    model: LoadedModel, request: Request, n_keys: int = N_KEYS, length: int = LENGTH, random_filler: bool = False
) -> PromptPairs:
    """Pairs of rows that end where the last key is asked."""
    n, generator = request.n, torch_generator(request.seed, "mqar", request.split)
    pool = ordinary(model, 2 * n_keys + 1)
    made = recall_rows(pool, n, n_keys=n_keys, length=length, random_filler=random_filler, generator=generator)
    asked = made.queries.argmax(dim=1)
    other = (asked + 1 + torch.randint(n_keys - 1, (n,), generator=generator)) % n_keys
    each, corrupt = torch.arange(n), made.ids.clone()
    right, wrong = made.values[each, asked], made.values[each, other]
    if request.corruption == "values":
        corrupt[each, 2 * asked + 1], corrupt[each, 2 * other + 1] = wrong, right
    else:
        corrupt[:, -1] = made.keys[each, other]
    return from_sequences(
        model,
        made.ids,
        corrupt,
        torch.stack([right, wrong], dim=1),
        {"KEY": 2 * asked, "VALUE": 2 * asked + 1},
    )


TASK = Task(
    name="mqar",
    question="Which value belongs to a key, when several pairs were given and several are asked?",
    example="k1 v1 k2 v2 k3 v3 . k2 . . k1 -> v1",
    corruptions={
        "values": "the value of the last key and that of another change places (the answer becomes the other value)",
        "query": "the last token becomes another key (the answer becomes that key's value)",
    },
    roles={"KEY": "the last key where it was given", "VALUE": "its value: the answer", "END": "where it is asked"},
    make=recall_pairs,
    words=False,
    paper="https://arxiv.org/abs/2312.04927",
)
