"""The planted models do what they say: they solve their task, by the heads and neurons that were written down."""

import pytest
import torch

from interp.core.errors import InterpError
from interp.instrument.capture import capture
from interp.instrument.edits import Edit, edited, zero
from interp.instrument.tokens import tokenize
from interp.models.probe import verify
from interp.models.toy.planted import Planted, planted, planted_names

every_model = pytest.mark.parametrize("name", planted_names())


def answers(made: Planted, side: int) -> list[str]:
    """What the model says to the clean (0) or corrupted (1) prompts."""
    logits = made.model(tokenize(made.model, [prompt[side] for prompt in made.prompts]))
    return [chr(int(token)) for token in logits[:, -1].argmax(-1)]


def test_there_are_at_least_six() -> None:
    assert {"induction", "lookup", "two_hop", "mlp_gate", "decoy", "redundant"} <= set(planted_names())


@every_model
def test_every_prompt_is_answered(name: str) -> None:
    made = planted(name, n=60, seed=3)
    assert answers(made, 0) == [prompt[2] for prompt in made.prompts]
    assert answers(made, 1) == [prompt[3] for prompt in made.prompts]


@every_model
def test_prompts_differ_between_seeds_and_not_within_one(name: str) -> None:
    assert planted(name, 20, seed=1).prompts == planted(name, 20, seed=1).prompts
    assert planted(name, 20, seed=1).prompts != planted(name, 20, seed=2).prompts


@every_model
def test_the_sites_mean_what_they_say(name: str) -> None:
    """All but the check that every site matters: most of these were left without a function."""
    made = planted(name, 6)
    report = verify(made.model, tokenize(made.model, [prompt[0] for prompt in made.prompts]).ids)
    assert len(report.checks) > 20
    assert [c for c in report.checks if not c.passed and c.name != "editing the site moves the logits"] == []


def silenced(made: Planted, *heads: str) -> int:
    """How many clean prompts are still answered with heads set to zero."""
    edits = [zero(f"z.{head[1]}", head=int(head.partition(".h")[2])) for head in heads]
    with edited(made.model, edits):
        return sum(said == prompt[2] for said, prompt in zip(answers(made, 0), made.prompts, strict=True))


def right_logit(made: Planted, edits: list[Edit]) -> float:
    tokens = tokenize(made.model, [prompt[0] for prompt in made.prompts])
    with edited(made.model, edits):
        logits = made.model(tokens)[:, -1]
    return float(logits[torch.arange(len(logits)), [ord(prompt[2]) for prompt in made.prompts]].mean())


def test_a_decoy_has_the_pattern_of_the_head_that_matters_and_no_effect() -> None:
    made = planted("decoy", 24)
    tokens = tokenize(made.model, [prompt[0] for prompt in made.prompts])
    with capture(made.model, ["pattern.1", "z.1"]) as acts:
        made.model(tokens)
    pattern = acts["pattern.1"][:, :, -1]
    assert torch.allclose(pattern[:, 0], pattern[:, 2], atol=0.05)
    assert acts["z.1"][:, -1, 0].norm(dim=-1).min() > 0.8
    assert silenced(made, "a1.h0", "a1.h3") == 24
    assert right_logit(made, [zero("z.1", head=1)]) > 10
    assert right_logit(made, [zero("z.1", head=0), zero("z.1", head=3)]) > 10
    assert abs(right_logit(made, [zero("z.1", head=2)])) < 1


def test_one_of_the_redundant_pair_is_not_missed_and_both_are() -> None:
    made = planted("redundant", 24)
    assert silenced(made, "a0.h0") == silenced(made, "a0.h2") == 24
    assert silenced(made, "a0.h0", "a0.h2") == 0


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(InterpError, match="induction"):
        planted("inductoin")
