"""Indirect object identification: who is given something, when two people were named and one of them gives it?

"When Mary and John met near the store, happily John offered a drink to" -> " Mary". Fifteen sentences of our own, each
as BABA (the giver is named first) and as its mirror ABBA (the receiver is), half of each.
    s2       the second mention of the giver becomes the other name: as natural a prompt, whose answer is the other
    abc      all three names become other ones, none twice: nothing says who is given something
    swapped  the two names change places everywhere: the order of the answers turns round, the sentence does not
Roles: IO (the one who receives), S1, S2 (first and second mention of the giver), S1+1 (the token after S1), END.
Papers: K. Wang et al., Interpretability in the wild, 2023, https://arxiv.org/abs/2211.00593; the corruption s2: F.
Zhang and N. Nanda, Towards best practices of activation patching, 2024, https://arxiv.org/abs/2309.16042.
Beware: abc has no right answer, so only the clean run's logit difference means something there.
"""

from __future__ import annotations

import torch

from interp.core.errors import InterpError
from interp.core.seed import torch_generator
from interp.models.model import LoadedModel
from interp.tasks.base import Draft, PromptPairs
from interp.tasks.task import Picker, Request, Task, draw_pairs, fill, held_out

STANDARD = "When {first} and {second} went to the {place}, {giver} gave a {thing} to"
EXAMPLES = (("John", "Mary"), ("Tom", "Anna"), ("James", "Sarah"), ("David", "Mark"))
"""Pairs of the eight standard prompts, each in both orders, with `store` and `drink`."""

TEMPLATES = (
    "Yesterday {S1} and {IO} walked to the {PLACE}, where {S2} gave a {OBJECT} to",
    "After {S1} and {IO} arrived at the {PLACE}, soon {S2} handed a {OBJECT} to",
    "When {S1} and {IO} met near the {PLACE}, happily {S2} offered a {OBJECT} to",
    "Once {S1} and {IO} came to the {PLACE}, quickly {S2} passed a {OBJECT} to",
    "While {S1} and {IO} waited at the {PLACE}, then {S2} showed a {OBJECT} to",
    "Today {S1} and {IO} sat inside the {PLACE}, and {S2} sold a {OBJECT} to",
    "Because {S1} and {IO} were in the {PLACE}, later {S2} brought a {OBJECT} to",
    "Last night {S1} and {IO} visited the {PLACE}, and {S2} gave a {OBJECT} to",
    "On Monday {S1} and {IO} found the {PLACE}, and {S2} lent a {OBJECT} to",
    "My friends {S1} and {IO} left the {PLACE}, and {S2} sent a {OBJECT} to",
    "At noon {S1} and {IO} reached the {PLACE}, and {S2} threw a {OBJECT} to",
    "Since {S1} and {IO} lived by the {PLACE}, often {S2} carried a {OBJECT} to",
    "Before {S1} and {IO} ran from the {PLACE}, first {S2} gave the {OBJECT} to",
    "In summer {S1} and {IO} painted the {PLACE}, and {S2} returned a {OBJECT} to",
    "The friends {S1} and {IO} entered the {PLACE}, and {S2} presented a {OBJECT} to",
)
"""BABA; written to be equally long in most tokenizers, so that one batch can hold all of them."""

NAMES = (
    "Mary", "John", "Tom", "Anna", "James", "Sarah", "David", "Mark", "Alice", "Peter", "Susan", "Paul", "Laura",
    "Robert", "Emma", "Daniel", "Jane", "Michael", "Lisa", "George", "Kate", "Henry", "Julia", "Simon", "William",
    "Richard", "Joseph", "Thomas", "Charles", "Christopher", "Matthew", "Anthony", "Andrew", "Steven", "Kevin", "Brian",
    "Edward", "Ronald", "Timothy", "Jason", "Jeffrey", "Ryan", "Jacob", "Gary", "Nicholas", "Eric", "Jonathan",
    "Stephen", "Larry", "Justin", "Scott", "Benjamin", "Samuel", "Frank", "Gregory", "Patrick", "Alexander", "Jack",
    "Dennis", "Jerry", "Tyler", "Aaron", "Adam", "Nathan", "Zachary", "Walter", "Kyle", "Harold", "Carl", "Jeremy",
    "Keith", "Roger", "Patricia", "Jennifer", "Linda", "Elizabeth", "Barbara", "Jessica", "Karen", "Nancy", "Betty",
    "Margaret", "Sandra", "Ashley", "Emily", "Donna", "Michelle", "Carol", "Amanda", "Melissa", "Stephanie", "Rebecca",
    "Amy", "Kathleen", "Angela", "Ruth", "Nicole", "Catherine", "Samantha", "Christine", "Helen", "Rachel", "Maria",
    "Diana", "Julie", "Victoria", "Kelly", "Lauren", "Martha",
)  # fmt: skip
PLACES = (
    "store", "park", "school", "office", "station", "hospital", "garden", "restaurant", "house", "library", "museum",
    "market",
)  # fmt: skip
OBJECTS = (
    "drink", "book", "ball", "letter", "key", "ring", "gift", "ticket", "computer", "necklace", "picture", "map",
)  # fmt: skip


def draft(first: str, second: str, giver: str, place: str = "store", thing: str = "drink") -> Draft:
    """One pair of the standard sentence; the giver is one of the two."""
    if first == second or giver not in (first, second):
        raise InterpError(f"giver={giver!r} must be one of two different names, got {first!r} and {second!r}")
    receiver = second if giver == first else first
    text = STANDARD.format(first=first, second=second, place=place, giver=giver, thing=thing)
    other = STANDARD.format(first=first, second=second, place=place, giver=receiver, thing=thing)
    roles = {
        "IO": text.index(receiver),
        "S1": text.index(giver),
        "S2": text.rindex(giver),
    }
    return Draft(clean=text, corrupt=other, right=f" {receiver}", wrong=f" {giver}", roles=roles)


def standard_drafts() -> list[Draft]:
    """The eight prompts of the reference numbers: four pairs of names in both orders, the second of the pair giving."""
    return [draft(a, b, giver=pair[1]) for pair in EXAMPLES for a, b in (pair, pair[::-1])]


def mirror(template: str) -> str:
    """A BABA sentence as ABBA: the two names of the first clause change places."""
    return template.replace("{S1}", "{?}").replace("{IO}", "{S1}").replace("{?}", "{IO}")


def random_draft(pick: Picker, order: str, corruption: str = "s2", split: str = "train") -> Draft:
    """One pair of `order` BABA or ABBA."""
    number = pick.one(held_out(range(len(TEMPLATES)), split))
    template = TEMPLATES[number] if order == "BABA" else mirror(TEMPLATES[number])
    giver, receiver, *others = pick.some(held_out(NAMES, split), 5)
    words = {
        "S1": giver, "S2": giver, "IO": receiver,
        "PLACE": pick.one(held_out(PLACES, split)), "OBJECT": pick.one(held_out(OBJECTS, split)),
    }  # fmt: skip
    changed = {
        "s2": {"S2": receiver},
        "abc": dict(zip(("S1", "IO", "S2"), others, strict=True)),
        "swapped": {"S1": receiver, "S2": receiver, "IO": giver},
    }[corruption]
    (clean, at), (corrupt, there) = fill(template, words), fill(template, words | changed)
    kept = ("IO", "S1", "S2")
    return Draft(
        clean=clean,
        corrupt=corrupt,
        right=f" {receiver}",
        wrong=f" {giver}",
        roles={role: at[role] for role in kept} | {"S1+1": _next(clean, at["S1"], giver)},
        corrupt_roles={role: there[role] for role in kept},
        template=f"{order} {number}",
        group=order,
    )


def _next(text: str, start: int, word: str) -> int:
    """First character after a word that is no space."""
    end = start + len(word)
    return end + (text[end] == " ")


def make(model: LoadedModel, request: Request) -> PromptPairs:
    """Random sentences, names, places and objects; half ABBA, half BABA."""

    def one(pick: Picker, order: str) -> Draft:
        return random_draft(pick, order, request.corruption, request.split)

    return draw_pairs(model, request, "ioi", one, ("ABBA", "BABA"))


TASK = Task(
    name="ioi",
    question="Who is given something, when two people were named and one of them gives it?",
    example="When Mary and John met near the store, happily John offered a drink to -> Mary",
    corruptions={
        "s2": "the second mention of the giver becomes the other name (the answer becomes the other)",
        "abc": "three unrelated names (there is no answer)",
        "swapped": "the two names change places everywhere (the answer becomes the other)",
    },
    roles={
        "IO": "the one who receives: the answer",
        "S1": "first mention of the giver",
        "S1+1": "the token after it",
        "S2": "second mention of the giver",
        "END": "the last token",
    },
    make=make,
    paper="https://arxiv.org/abs/2211.00593",
)


def ioi_pairs(model: LoadedModel, n: int = 8, seed: int = 0) -> PromptPairs:
    """`n` pairs of the task with its default corruption."""
    return TASK.pairs(model, n, seed)


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
