"""Colored objects: which color has the object that is asked for, when three were named?

    Q: On the desk, there is a red pen, a blue cup, and a green ball. What color is the cup?
    A: Blue
    Q: On the floor, I see a black box, a white hat, and a brown bag. What color is the hat?
    A:                                                                                     -> White
One question is answered first (one shot), with other objects. The corruption asks for another of the three objects: the
answer becomes its color. Measured by the probability of the right color less that of the other two.
Roles: COLOR1-3, OBJECT1-3 (of the second question, in order), QUERY (the object asked for), END.
Source: J. Merullo et al., Circuit component reuse across tasks, 2024, https://arxiv.org/abs/2310.08744.
Beware: a model that names any of the three colors is right in a third of the prompts.
"""

from __future__ import annotations

from interp.models.model import LoadedModel
from interp.tasks.base import Draft, PromptPairs
from interp.tasks.task import Picker, Request, Task, draw_pairs, fill, held_out

QUESTION = (
    "Q: On the {PLACE}, {SEEN} a {COLOR1} {OBJECT1}, a {COLOR2} {OBJECT2}, and a {COLOR3} {OBJECT3}. "
    "What color is the {QUERY}?\nA:"
)
PLACES = ("table", "desk", "floor", "bed", "chair", "shelf")
SEEN = ("there is", "you see", "I see")
COLORS = ("red", "blue", "green", "black", "white", "brown", "yellow", "pink", "purple")
"""Without orange: it is also a thing, and asks for `an`."""
OBJECTS = (
    "pen", "cup", "ball", "box", "hat", "bag", "book", "key", "ring", "phone", "bottle", "card", "plate", "shoe",
    "coin", "lamp", "spoon", "shirt",
)  # fmt: skip


def random_draft(pick: Picker, split: str = "train") -> Draft:
    """One pair."""
    shown, shown_words, shot = _question(pick, split, avoid=())
    _, words, which = _question(pick, split, avoid=[shown_words[f"OBJECT{i}"] for i in (1, 2, 3)])
    other, third = pick.some([i for i in (1, 2, 3) if i != which], 2)
    shot_answer = shown_words[f"COLOR{shot}"].capitalize()
    template = f"{shown} {shot_answer}\n{QUESTION}"
    (clean, at), (corrupt, there) = (
        fill(template, words | {"QUERY": words[f"OBJECT{number}"]}) for number in (which, other)
    )  # fmt: skip
    roles = (*(f"COLOR{i}" for i in (1, 2, 3)), *(f"OBJECT{i}" for i in (1, 2, 3)), "QUERY")
    answers = {number: f" {words[f'COLOR{number}'].capitalize()}" for number in (1, 2, 3)}
    return Draft(
        clean=clean,
        corrupt=corrupt,
        right=answers[which],
        wrong=answers[other],
        also_wrong=(answers[third],),
        roles={role: at[role] for role in roles},
        corrupt_roles={role: there[role] for role in roles},
        template=words["SEEN"],
    )


def _question(pick: Picker, split: str, avoid: tuple[str, ...] | list[str]) -> tuple[str, dict[str, str], int]:
    """A question, its words, and which of the three it asks for."""
    colors = pick.some(held_out(COLORS, split), 3)
    objects = pick.some([name for name in held_out(OBJECTS, split) if name not in avoid], 3)
    words = {"PLACE": pick.one(held_out(PLACES, split)), "SEEN": pick.one(SEEN)}
    words |= {f"COLOR{i + 1}": color for i, color in enumerate(colors)}
    words |= {f"OBJECT{i + 1}": name for i, name in enumerate(objects)}
    which = pick.one((1, 2, 3))
    text, _ = fill(QUESTION, words | {"QUERY": words[f"OBJECT{which}"]})
    return text, words, which


def make(model: LoadedModel, request: Request) -> PromptPairs:
    """Random places, colors and objects."""
    return draw_pairs(model, request, "colored-objects", lambda pick, _: random_draft(pick, request.split))


TASK = Task(
    name="colored-objects",
    question="Which color has the object that is asked for, when three were named?",
    example="Q: On the floor, I see a black box, a white hat, and a brown bag. What color is the hat? A: -> White",
    corruptions={"query": "another of the three objects is asked for (the answer becomes its color)"},
    roles={f"COLOR{i}": f"color of object {i}" for i in (1, 2, 3)}
    | {f"OBJECT{i}": f"object {i}" for i in (1, 2, 3)}
    | {"QUERY": "the object asked for", "END": "the last token"},
    make=make,
    metric="prob_diff",
    paper="https://arxiv.org/abs/2310.08744",
)
