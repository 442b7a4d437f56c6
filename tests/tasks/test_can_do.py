"""A real model does the tasks that it should, not those that it cannot, and the corruptions take the answer away."""

from __future__ import annotations

import pytest
import torch

from interp.core.errors import InterpError
from interp.models.load import load
from interp.models.model import LoadedModel
from interp.tasks.base import PromptPairs
from interp.tasks.library import accuracy, check_accuracy, make_pairs
from interp.tasks.task import SPLITS

pytestmark = [pytest.mark.slow, pytest.mark.needs_model("smollm2-135m")]
DONE = ("ioi", "greater-than", "gendered-pronoun", "facts", "agreement", "docstring", "induction")


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load("smollm2-135m", check=False)


def values(model: LoadedModel, pairs: PromptPairs) -> tuple[torch.Tensor, torch.Tensor]:
    """The task's own metric on the clean and on the corrupted prompts."""
    metric, rows = pairs.metric(), torch.arange(len(pairs))
    clean, corrupt = (metric(model(side)[:, -metric.n_last :], rows) for side in (pairs.clean, pairs.corrupt))
    return clean, corrupt


@pytest.mark.parametrize("name", DONE)
def test_smollm_does_it_and_the_corruption_undoes_it(model: LoadedModel, name: str) -> None:
    for split in SPLITS:
        pairs = make_pairs(model, name, 12, seed=1, split=split)
        assert check_accuracy(model, pairs, min_accuracy=0.8).n == 12
        clean, corrupt = values(model, pairs)
        assert float((corrupt < clean).double().mean()) >= 0.9
        if name in ("ioi", "gendered-pronoun", "facts", "agreement", "induction"):  # the answer is the other one
            assert float((corrupt < 0).double().mean()) >= 0.75


def test_smollm_is_refused_what_it_cannot_do(model: LoadedModel) -> None:
    for name in ("colored-objects", "modular-addition"):
        pairs = make_pairs(model, name, 16)
        assert accuracy(model, pairs).interval.high < 0.9
        with pytest.raises(InterpError, match="of 16 prompts right"):
            check_accuracy(model, pairs)


def test_standard_prompts_have_their_reference_numbers(model: LoadedModel) -> None:
    clean, corrupt = values(model, make_pairs(model, "ioi-standard", 8))
    assert float(clean.mean()) == pytest.approx(5.60, abs=0.15)
    assert float(corrupt.mean()) == pytest.approx(-5.37, abs=0.15)
