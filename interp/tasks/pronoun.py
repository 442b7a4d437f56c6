"""Gendered pronoun: which pronoun goes with a name, or with a word that means a man or a woman?

"So Laura is such a kind person, isn't" -> " she". Half he, half she. The corruption takes a name, or the word's partner
(king, queen), of the other gender, which turns the answer round. Names are those that are given to one gender nearly
always; words are those that mean it (no professions: those ask for a prejudice).
Roles: NAME (the name or the word), END.
Paper: C. Mathwin et al., Identifying a preliminary circuit for predicting gendered pronouns in GPT-2 small, 2023,
https://itch.io/jam/mechint/rate/1889871.
"""

from __future__ import annotations

from interp.models.model import LoadedModel
from interp.tasks.base import Draft, PromptPairs
from interp.tasks.task import Picker, Request, Task, draw_pairs, fill, held_out

NAMED = (
    "So {NAME} is such a kind person, isn't",
    "Well {NAME} is quite a good cook, isn't",
    "Now {NAME} is really a fast runner, isn't",
    "Yes {NAME} was always a great teacher, wasn't",
    "And {NAME} was once a famous writer, wasn't",
    "But {NAME} has become a good friend, hasn't",
)
MEANT = (
    "The {NAME} went to bed very late last night because",
    "The {NAME} had to leave the party quite early because",
    "The {NAME} did not come to the office today because",
    "The {NAME} could not find the old house in which",
    "The {NAME} closed the door of the small room before",
    "The {NAME} told us a very long story about how",
)
"""As long as the sentences with a name, in most tokenizers."""
MEN = (
    "John", "Robert", "James", "Michael", "David", "Paul", "Mark", "George", "Peter", "Thomas", "Henry", "Edward",
    "Richard", "William", "Charles", "Daniel", "Andrew", "Brian", "Steven", "Frank", "Eric", "Jack", "Kevin", "Simon",
)  # fmt: skip
WOMEN = (
    "Mary", "Anna", "Sarah", "Susan", "Laura", "Emma", "Jane", "Lisa", "Alice", "Julia", "Linda", "Karen", "Nancy",
    "Margaret", "Helen", "Rachel", "Maria", "Elizabeth", "Barbara", "Jennifer", "Ruth", "Emily", "Carol", "Diana",
)  # fmt: skip
WORDS = (
    ("king", "queen"), ("father", "mother"), ("brother", "sister"), ("man", "woman"), ("boy", "girl"),
    ("son", "daughter"), ("husband", "wife"), ("uncle", "aunt"), ("prince", "princess"), ("actor", "actress"),
    ("nephew", "niece"), ("gentleman", "lady"),
)  # fmt: skip
ANSWERS = (" he", " she")


def random_draft(pick: Picker, group: str, split: str = "train") -> Draft:
    """One pair whose clean answer is the group, `he` or `she`; half of them with a name."""
    gender = ("he", "she").index(group)
    named = bool(pick.one((0, 1)))
    number = pick.one(held_out(range(len(NAMED)), split))
    words = pick.one(held_out(WORDS, split))
    if named:
        words = pick.one(held_out(MEN, split)), pick.one(held_out(WOMEN, split))
    template = (NAMED if named else MEANT)[number]
    (clean, at), (corrupt, there) = (fill(template, {"NAME": words[i]}) for i in (gender, 1 - gender))
    return Draft(
        clean=clean,
        corrupt=corrupt,
        right=ANSWERS[gender],
        wrong=ANSWERS[1 - gender],
        roles={"NAME": at["NAME"]},
        corrupt_roles={"NAME": there["NAME"]},
        template=f"{'name' if named else 'word'} {number}",
        group=group,
    )


def make(model: LoadedModel, request: Request) -> PromptPairs:
    """Random sentences; half he, half she."""
    return draw_pairs(
        model, request, "pronoun", lambda pick, group: random_draft(pick, group, request.split), ("he", "she")
    )


TASK = Task(
    name="gendered-pronoun",
    question="Which pronoun goes with a name, or with a word that means a man or a woman?",
    example="So Laura is such a kind person, isn't -> she",
    corruptions={"gender": "a name of the other gender, or the word's partner (the answer becomes the other pronoun)"},
    roles={"NAME": "the name or the word", "END": "the last token"},
    make=make,
)
