"""The eight fixed prompts of indirect object identification whose results are known: always the same, in this order.

Reference numbers with SmolLM2-135M: mean logit difference 5.60 on the clean prompts, -5.37 on the corrupted ones.
"""

from __future__ import annotations

from interp.models.model import LoadedModel
from interp.tasks.base import PromptPairs, align
from interp.tasks.ioi import TASK as IOI
from interp.tasks.ioi import standard_drafts
from interp.tasks.task import Request, Task


def make(model: LoadedModel, request: Request) -> PromptPairs:
    """The first `n` of the eight; there is no seed and no split in them."""
    pairs = align(model, standard_drafts())
    return pairs.take(range(min(request.n, len(pairs))))


TASK = Task(
    name="ioi-standard",
    question="Indirect objects in eight fixed prompts with known results",
    example="When John and Mary went to the store, Mary gave a drink to -> John",
    corruptions={"s2": IOI.corruptions["s2"]},
    roles={role: IOI.roles[role] for role in ("IO", "S1", "S2", "END")},
    make=make,
    paper=IOI.paper,
)
