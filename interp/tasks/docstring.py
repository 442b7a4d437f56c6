"""Docstring: which argument of a function is documented next?

    def make(self, A, B, C, D):
        \"\"\"word word

        :param A: word word
        :param B: word word
        :param                     -> C
    c    C becomes another name in the definition: the answer becomes that one
    def  all arguments become others in the definition: it no longer says what comes next
    doc  the documented arguments become others, in the docstring only: nothing says how far it has come
Measured by the probability of C less that of A, B and D together (for `c`: and of the other name).
Roles: A_def, B_def, C_def, A_doc, B_doc, param_3, END (the same token as param_3 for most tokenizers).
Source: S. Heimersheim and J. Janiak, A circuit for Python docstrings in a 4-layer attention-only transformer, 2023,
https://www.alignmentforum.org/posts/u6KXXmKFbXfWzoAXn.
Beware: with `def` and `doc` there is no right answer to the corrupted prompt.
"""

from __future__ import annotations

from interp.models.model import LoadedModel
from interp.tasks.base import Draft, PromptPairs
from interp.tasks.task import Picker, Request, Task, draw_pairs, fill, held_out

TEMPLATE = '''def {FUNCTION}(self, {A_def}, {B_def}, {C_def}, {D_def}):
    """{W1} {W2}

    :param {A_doc}: {W3} {W4}
    :param {B_doc}: {W5} {W6}
    :{param_3}'''
FUNCTIONS = ("make", "run", "load", "find", "move", "send", "read", "sort", "test", "build", "check", "start")
ARGUMENTS = (
    "name", "size", "file", "path", "data", "key", "value", "index", "text", "color", "user", "image", "title", "state",
    "count", "date", "group", "level", "line", "list", "model", "node", "number", "order", "page", "parent", "point",
    "result", "source", "string", "table", "target", "time", "type", "url", "version", "width", "height", "offset",
    "limit",
)  # fmt: skip
WORDS = (
    "river", "window", "summer", "letter", "garden", "music", "paper", "winter", "doctor", "kitchen", "bridge",
    "coffee", "market", "island", "engine", "mountain", "forest", "ocean", "village", "silver", "bottle", "castle",
    "dinner", "sugar",
)  # fmt: skip


def random_draft(pick: Picker, corruption: str = "c", split: str = "train") -> Draft:
    """One pair."""
    a, b, c, d, *others = pick.some(held_out(ARGUMENTS, split), 8)
    words = {f"W{i + 1}": word for i, word in enumerate(pick.some(held_out(WORDS, split), 6))}
    words |= {"A_def": a, "B_def": b, "C_def": c, "D_def": d, "A_doc": a, "B_doc": b, "param_3": "param"}
    words["FUNCTION"] = pick.one(held_out(FUNCTIONS, split))
    changed = {
        "c": {"C_def": others[0]},
        "def": dict(zip(("A_def", "B_def", "C_def", "D_def"), others, strict=True)),
        "doc": dict(zip(("A_doc", "B_doc"), others, strict=False)),
    }[corruption]
    (clean, at), (corrupt, there) = fill(TEMPLATE, words), fill(TEMPLATE, words | changed)
    roles = ("A_def", "B_def", "C_def", "A_doc", "B_doc", "param_3")
    wrong = [others[0], a, b, d] if corruption == "c" else [d, a, b]
    return Draft(
        clean=clean,
        corrupt=corrupt,
        right=f" {c}",
        wrong=f" {wrong[0]}",
        also_wrong=tuple(f" {word}" for word in wrong[1:]),
        roles={role: at[role] for role in roles},
        corrupt_roles={role: there[role] for role in roles},
        template="docstring",
    )


def make(model: LoadedModel, request: Request) -> PromptPairs:
    """Random functions, arguments and words."""
    return draw_pairs(
        model, request, "docstring", lambda pick, _: random_draft(pick, request.corruption, request.split)
    )


TASK = Task(
    name="docstring",
    question="Which argument of a function is documented next?",
    example="def run(self, name, size, file, path): ... :param name: ... :param size: ... :param -> file",
    corruptions={
        "c": "the argument to come becomes another in the definition (the answer becomes that one)",
        "def": "all arguments of the definition become others (there is no answer)",
        "doc": "the documented arguments become others in the docstring (there is no answer)",
    },
    roles={
        "A_def": "first argument in the definition",
        "B_def": "second argument there",
        "C_def": "third argument there: the answer",
        "A_doc": "first argument in the docstring",
        "B_doc": "second argument there",
        "param_3": "the third `param`",
        "END": "the last token",
    },
    make=make,
    metric="prob_diff",
    paper="https://www.alignmentforum.org/posts/u6KXXmKFbXfWzoAXn",
)
