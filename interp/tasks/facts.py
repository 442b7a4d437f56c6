"""Factual recall: what does a model know of a subject?

"The capital of France is the city of" -> " Paris", and "Nearly all of the people in France speak" -> " French". The
corruption is another subject with as many tokens, whose answer is another. Measured by the logit difference of the two.
Roles: SUBJECT (its first token), SUBJECT_last (its last one), END.
Paper: K. Meng et al., Locating and editing factual associations in GPT, 2022, https://arxiv.org/abs/2202.05262.
Beware: the logit difference asks which of two answers it is, which is easier than naming it; `top1` of the accuracy
says how often the model would.
"""

from __future__ import annotations

from interp.models.model import LoadedModel
from interp.tasks.base import Draft, PromptPairs
from interp.tasks.task import Picker, Request, Task, draw_pairs, fill, held_out

CAPITALS = (
    ("France", "Paris"), ("Italy", "Rome"), ("Germany", "Berlin"), ("Spain", "Madrid"), ("Japan", "Tokyo"),
    ("Russia", "Moscow"), ("China", "Beijing"), ("Egypt", "Cairo"), ("Greece", "Athens"), ("Austria", "Vienna"),
    ("England", "London"), ("Ireland", "Dublin"), ("Portugal", "Lisbon"), ("Cuba", "Havana"), ("Iran", "Tehran"),
    ("Iraq", "Baghdad"), ("Canada", "Ottawa"), ("Peru", "Lima"), ("Kenya", "Nairobi"), ("Norway", "Oslo"),
    ("Sweden", "Stockholm"), ("Finland", "Helsinki"), ("Poland", "Warsaw"), ("Hungary", "Budapest"),
    ("Belgium", "Brussels"), ("Denmark", "Copenhagen"), ("Turkey", "Ankara"), ("Scotland", "Edinburgh"),
    ("Thailand", "Bangkok"), ("Syria", "Damascus"), ("Lebanon", "Beirut"), ("Afghanistan", "Kabul"),
    ("Ukraine", "Kiev"), ("Taiwan", "Taipei"), ("Philippines", "Manila"), ("Vietnam", "Hanoi"),
    ("Venezuela", "Caracas"), ("Indonesia", "Jakarta"), ("Serbia", "Belgrade"), ("Bulgaria", "Sofia"),
    ("South Korea", "Seoul"), ("Saudi Arabia", "Riyadh"), ("North Korea", "Pyongyang"), ("Jordan", "Amman"),
    ("Nepal", "Kathmandu"), ("Chile", "Santiago"), ("Argentina", "Buenos"), ("Libya", "Tripoli"),
)  # fmt: skip
LANGUAGES = (
    ("France", "French"), ("Italy", "Italian"), ("Germany", "German"), ("Spain", "Spanish"), ("Japan", "Japanese"),
    ("Russia", "Russian"), ("China", "Chinese"), ("Egypt", "Arabic"), ("Greece", "Greek"), ("Portugal", "Portuguese"),
    ("Norway", "Norwegian"), ("Sweden", "Swedish"), ("Poland", "Polish"), ("Denmark", "Danish"), ("Turkey", "Turkish"),
    ("Brazil", "Portuguese"), ("Mexico", "Spanish"), ("Iran", "Persian"), ("Israel", "Hebrew"), ("England", "English"),
    ("Finland", "Finnish"), ("Netherlands", "Dutch"), ("Austria", "German"), ("Argentina", "Spanish"),
    ("Korea", "Korean"), ("Vietnam", "Vietnamese"), ("Hungary", "Hungarian"), ("Iraq", "Arabic"), ("Cuba", "Spanish"),
    ("Australia", "English"),
)  # fmt: skip
TEMPLATES = {
    "capital": (
        "The capital of {SUBJECT} is the city of",
        "The capital city of {SUBJECT} is now called",
        "Everyone knows that the capital of {SUBJECT} is",
    ),
    "language": (
        "The official language spoken in {SUBJECT} is called",
        "Nearly all of the people in {SUBJECT} speak",
        "The language of the people in {SUBJECT} is",
    ),
}
FACTS = {"capital": CAPITALS, "language": LANGUAGES}
SUBJECTS = tuple(dict.fromkeys(subject for known in FACTS.values() for subject, _ in known))
"""A subject is in one split, whatever is asked about it."""


def random_draft(pick: Picker, split: str = "train") -> Draft:
    """One pair of a relation, two subjects with different answers."""
    relation = pick.one(tuple(FACTS))
    number = pick.one(range(len(TEMPLATES[relation])))
    subjects = held_out(SUBJECTS, split)
    template, known = TEMPLATES[relation][number], [fact for fact in FACTS[relation] if fact[0] in subjects]
    subject, right = pick.one(known)
    other, wrong = pick.one([fact for fact in known if fact[1] != right])
    (clean, at), (corrupt, there) = fill(template, {"SUBJECT": subject}), fill(template, {"SUBJECT": other})
    return Draft(
        clean=clean,
        corrupt=corrupt,
        right=f" {right}",
        wrong=f" {wrong}",
        roles={"SUBJECT": at["SUBJECT"], "SUBJECT_last": at["SUBJECT"] + len(subject) - 1},
        corrupt_roles={"SUBJECT": there["SUBJECT"], "SUBJECT_last": there["SUBJECT"] + len(other) - 1},
        template=f"{relation} {number}",
    )


def make(model: LoadedModel, request: Request) -> PromptPairs:
    """Random relations and subjects."""
    return draw_pairs(model, request, "facts", lambda pick, _: random_draft(pick, request.split))


TASK = Task(
    name="facts",
    question="What does the model know of a subject?",
    example="The capital of France is the city of -> Paris",
    corruptions={"subject": "another subject of as many tokens (the answer becomes its answer)"},
    roles={"SUBJECT": "first token of the subject", "SUBJECT_last": "its last token", "END": "the last token"},
    make=make,
    paper="https://arxiv.org/abs/2202.05262",
)
