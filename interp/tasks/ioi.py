"""Indirect object identification: who is given something, when two people were named and one of them gives it?

"When Mary and John went to the store, John gave a drink to" -> " Mary". The corruption is symmetric token replacement:
the second mention of the giver (S2) becomes the other name, which makes a prompt as natural whose answer is the other.
Roles: IO (the one who receives), S1, S2 (first and second mention of the giver), END (the last token).
Papers: K. Wang et al., Interpretability in the wild, 2023, https://arxiv.org/abs/2211.00593; the corruption: F. Zhang
and N. Nanda, Towards best practices of activation patching, 2024, https://arxiv.org/abs/2309.16042.
"""

from __future__ import annotations

import torch

from interp.core.errors import InterpError
from interp.core.seed import torch_generator
from interp.models.model import LoadedModel
from interp.tasks.base import Draft, PromptPairs, align

TEMPLATE = "When {first} and {second} went to the {place}, {giver} gave a {thing} to"
NAMES = (
    "Mary", "John", "Tom", "Anna", "James", "Sarah", "David", "Mark", "Alice", "Peter", "Susan", "Paul", "Laura",
    "Robert", "Emma", "Daniel", "Jane", "Michael", "Lisa", "George", "Kate", "Henry", "Julia", "Simon",
)  # fmt: skip
PLACES = ("store", "park", "school", "office", "station", "hospital", "garden", "restaurant")
THINGS = ("drink", "book", "ball", "letter", "key", "ring", "gift", "ticket")
EXAMPLES = (("John", "Mary"), ("Tom", "Anna"), ("James", "Sarah"), ("David", "Mark"))
"""Pairs of the eight standard prompts, each in both orders, with `store` and `drink`."""


def draft(first: str, second: str, giver: str, place: str = "store", thing: str = "drink") -> Draft:
    """One pair of prompts; the giver is one of the two."""
    if first == second or giver not in (first, second):
        raise InterpError(f"giver={giver!r} must be one of two different names, got {first!r} and {second!r}")
    receiver = second if giver == first else first
    text = TEMPLATE.format(first=first, second=second, place=place, giver=giver, thing=thing)
    other = TEMPLATE.format(first=first, second=second, place=place, giver=receiver, thing=thing)
    roles = {
        "IO": text.index(receiver),
        "S1": text.index(giver),
        "S2": text.rindex(giver),
    }
    return Draft(clean=text, corrupt=other, right=f" {receiver}", wrong=f" {giver}", roles=roles)


def standard_drafts() -> list[Draft]:
    """The eight prompts of the reference numbers: four pairs of names in both orders, the second of the pair giving."""
    return [draft(a, b, giver=pair[1]) for pair in EXAMPLES for a, b in (pair, pair[::-1])]


def random_drafts(n: int, seed: int) -> list[Draft]:
    """Names, order, giver, place and thing drawn at random; half of them ABBA, half BABA."""
    if n < 1:
        raise InterpError(f"n={n} prompt pairs; ask for at least 1")
    generator = torch_generator(seed, "ioi")

    def pick(items: tuple[str, ...], k: int = 1) -> list[str]:
        return [items[i] for i in torch.randperm(len(items), generator=generator)[:k].tolist()]

    made: list[Draft] = []
    for i in range(n):
        first, second = pick(NAMES, 2)
        made.append(draft(first, second, (first, second)[i % 2], pick(PLACES)[0], pick(THINGS)[0]))
    return made


def ioi_pairs(model: LoadedModel, n: int = 8, seed: int = 0) -> PromptPairs:
    """`n` aligned pairs. Drawn with a margin, so that those a tokenizer splits can be dropped; the drop is counted."""
    pairs = align(model, random_drafts(2 * n, seed))
    return pairs.take(range(min(n, len(pairs)))) if len(pairs) >= n else pairs


def random_pairs(model: LoadedModel, n: int = 3, length: int = 8, seed: int = 0) -> PromptPairs:
    """Pairs of random tokens that differ in one place: nothing to find, for models that cannot read."""
    from interp.instrument.tokens import from_ids

    assert model.dims.d_vocab is not None
    generator = torch_generator(seed, "random pairs")
    n_plain = min(model.dims.d_vocab, 250)
    clean = torch.randint(n_plain, (n, length), generator=generator)
    corrupt = clean.clone()
    where = length // 2
    corrupt[:, where] = (clean[:, where] + 1 + torch.randint(n_plain - 1, (n,), generator=generator)) % n_plain
    answers = torch.stack([torch.randperm(n_plain, generator=generator)[:2] for _ in range(n)])
    roles = {"S2": torch.full((n,), where), "END": torch.full((n,), length - 1)}
    return PromptPairs(clean=from_ids(model, clean), corrupt=from_ids(model, corrupt), answers=answers, roles=roles)
