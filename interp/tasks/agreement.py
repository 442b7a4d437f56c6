"""Subject-verb agreement: does the verb follow its subject, though another noun stands between?

"The keys near the cabinet" -> " are" rather than " is". The corruption changes the number of the subject, which turns
the answer round; the noun between (the attractor) stays. Singular and plural subjects, with an attractor of the same
and of the other number: a quarter of the pairs each. Measured by the probability of the right forms of be and have
(is, was, has / are, were, have) less that of the wrong ones.
Roles: SUBJECT, ATTRACTOR, END (the same token as ATTRACTOR).
Papers: T. Linzen et al., Assessing the ability of LSTMs to learn syntax-sensitive dependencies, 2016,
https://arxiv.org/abs/1611.01368; M. Finlayson et al., Causal analysis of syntactic agreement mechanisms in neural
language models, 2021, https://arxiv.org/abs/2106.06087.
Beware: an attractor of the same number answers as well; the groups `... other` are the hard half.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from interp.models.model import LoadedModel
from interp.tasks.base import Draft, PromptPairs, answer_token
from interp.tasks.metrics import AnswerSets
from interp.tasks.task import Picker, Request, Task, draw_pairs, fill, held_out

TEMPLATES = (
    "The {SUBJECT} near the {ATTRACTOR}",
    "The {SUBJECT} behind the {ATTRACTOR}",
    "The {SUBJECT} beside the {ATTRACTOR}",
    "The {SUBJECT} above the {ATTRACTOR}",
    "The {SUBJECT} under the {ATTRACTOR}",
    "The {SUBJECT} with the {ATTRACTOR}",
)
SUBJECTS = (
    "key", "teacher", "doctor", "student", "farmer", "book", "picture", "letter", "dog", "bird", "boy", "girl", "car",
    "guard", "artist", "driver", "lawyer", "worker", "writer", "player", "singer", "horse", "child", "lamp",
)  # fmt: skip
ATTRACTORS = (
    "cabinet", "house", "table", "garden", "window", "bridge", "school", "tree", "river", "wall", "building", "door",
    "train", "truck", "fence", "tower", "church", "shop",
)  # fmt: skip
IRREGULAR = {"child": "children", "church": "churches", "fence": "fences"}
SINGULAR, PLURAL = (" is", " was", " has"), (" are", " were", " have")
GROUPS = ("singular same", "singular other", "plural same", "plural other")


def in_number(noun: str, plural: bool) -> str:
    """The noun in one number."""
    return (IRREGULAR.get(noun) or f"{noun}s") if plural else noun


def random_draft(pick: Picker, group: str, split: str = "train") -> Draft:
    """One pair of a group."""
    plural, same = group.startswith("plural"), group.endswith("same")
    number = pick.one(held_out(range(len(TEMPLATES)), split))
    subject, attractor = pick.one(held_out(SUBJECTS, split)), pick.one(held_out(ATTRACTORS, split))
    between = {"ATTRACTOR": in_number(attractor, plural == same)}
    (clean, at), (corrupt, there) = (
        fill(TEMPLATES[number], between | {"SUBJECT": in_number(subject, p)}) for p in (plural, not plural)
    )
    right, wrong = (PLURAL, SINGULAR) if plural else (SINGULAR, PLURAL)
    return Draft(
        clean=clean, corrupt=corrupt, right=right[0], wrong=wrong[0], roles=at, corrupt_roles=there,
        template=f"{number} {group}", group=group,
    )  # fmt: skip


def make(model: LoadedModel, request: Request) -> PromptPairs:
    """Random nouns; the four groups in equal shares."""
    pairs = draw_pairs(
        model, request, "agreement", lambda pick, group: random_draft(pick, group, request.split), GROUPS
    )
    before = (pairs.clean.texts or ("",))[0]
    forms = [[answer_token(model, before, text) for text in side] for side in (SINGULAR, PLURAL)]
    ids = [[-1 if token is None else token for token in side] for side in forms]
    is_plural = pairs.answers[:, 0] == ids[1][0]
    sides = [torch.tensor(side).expand(len(pairs), -1) for side in ids]
    right, wrong = (torch.where(is_plural[:, None], a, b) for a, b in ((sides[1], sides[0]), sides))
    return replace(pairs, own=AnswerSets(right=right, wrong=wrong))


TASK = Task(
    name="agreement",
    question="Does the verb follow its subject, though another noun stands between?",
    example="The keys near the cabinet -> are",
    corruptions={"number": "the subject in the other number (the answer becomes the other form)"},
    roles={"SUBJECT": "the subject", "ATTRACTOR": "the noun between", "END": "the last token"},
    make=make,
    metric="prob_diff",
    paper="https://arxiv.org/abs/1611.01368",
)
