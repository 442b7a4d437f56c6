"""The list of tasks, accuracy with its interval, and metrics of pairs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.stats import binomtest

from interp import tasks as folder
from interp.core.errors import InterpError
from interp.models.model import LoadedModel
from interp.models.tiny import tiny_model
from interp.tasks.base import PromptPairs
from interp.tasks.library import TASKS, accuracy, by_template, check_accuracy, find_task, make_pairs, wilson
from interp.tasks.metrics import NAMES, AnswerMetric, AnswerSets, Divergence, Metric


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_model("llama", n_layers=1)


@pytest.fixture(scope="module")
def pairs(model: LoadedModel) -> PromptPairs:
    """Answers after the fact: the model's likeliest and unlikeliest next token, so that it is always right."""
    made = make_pairs(model, "induction", 20)
    order = model(made.clean)[:, -1].argsort(dim=-1)
    return replace(made, answers=torch.stack([order[:, -1], order[:, 0]], dim=1))


def test_every_file_with_a_task_is_found_and_described() -> None:
    files = [path for path in Path(folder.__path__[0]).glob("*.py") if "\nTASK = Task(" in path.read_text()]
    assert len(files) == len(TASKS) == 13
    assert list(TASKS) == sorted(TASKS)
    for name, task in TASKS.items():
        assert task.name == name and task.question.endswith(("?", "results")) and "->" in task.example
        assert "END" in task.roles and task.corruptions
    with pytest.raises(InterpError, match="nearest: greater-than"):
        find_task("greater")


@pytest.mark.parametrize(("n_right", "n"), [(0, 5), (5, 5), (8, 8), (29, 32), (1, 1), (517, 1000)])
def test_the_interval_is_wilsons(n_right: int, n: int) -> None:
    other = binomtest(n_right, n).proportion_ci(method="wilson")
    found = wilson(n_right, n)
    assert (found.low, found.high) == pytest.approx((other.low, other.high), abs=1e-12)
    assert found.estimate == n_right / n and 0 <= found.low <= found.estimate <= found.high <= 1


def test_proportions_that_are_none() -> None:
    for n_right, n in ((3, 2), (-1, 4), (0, 0)):
        with pytest.raises(InterpError, match="no proportion"):
            wilson(n_right, n)


def test_a_model_that_is_right_passes_and_one_that_is_wrong_is_refused(model: LoadedModel, pairs: PromptPairs) -> None:
    found = check_accuracy(model, pairs)
    assert (found.n_right, found.n, found.n_top1) == (20, 20, 20) and all(found.right)
    assert found.interval.low == pytest.approx(0.8389, abs=1e-4)
    turned = replace(pairs, answers=pairs.answers.flip(1))
    wrong = accuracy(model, turned)
    assert (wrong.n_right, wrong.n_top1) == (0, 0)
    with pytest.raises(InterpError, match=r"0 of 20 prompts right \(0%, 95 % interval 0% to 16%\), below .*=0.9"):
        check_accuracy(model, turned)
    assert check_accuracy(model, turned, min_accuracy=0.0) == wrong
    half = replace(pairs, answers=torch.cat([pairs.answers[:10], turned.answers[10:]]))
    assert accuracy(model, half).right == (True,) * 10 + (False,) * 10
    assert "10 of 20 prompts right (50%" in str(accuracy(model, half))


def test_accuracy_is_of_the_tasks_own_metric(model: LoadedModel, pairs: PromptPairs) -> None:
    """The likeliest token against all others together: rarely above one half."""
    others = torch.stack([torch.tensor([i for i in range(259) if i != a]) for a in pairs.answers[:, 0].tolist()])
    strict = replace(pairs, own=AnswerSets(right=pairs.answers[:, :1], wrong=others))
    p = model(pairs.clean)[:, -1].softmax(-1).amax(-1)
    assert accuracy(model, strict).right == tuple((p > 0.5).tolist())
    assert not all(accuracy(model, strict).right)


def test_metrics_by_name(model: LoadedModel, pairs: PromptPairs) -> None:
    logits = model(pairs.clean)[:, -1:]
    rows = torch.arange(20)
    right, wrong = logits[:, 0].gather(1, pairs.answers).unbind(1)
    assert torch.equal(pairs.metric()(logits, rows), right - wrong)
    p = logits[:, 0].softmax(-1).gather(1, pairs.answers)
    torch.testing.assert_close(pairs.metric("prob")(logits, rows), p[:, 0])
    torch.testing.assert_close(pairs.metric("log_prob")(logits, rows), p[:, 0].log())
    torch.testing.assert_close(pairs.metric("prob_diff")(logits, rows), p[:, 0] - p[:, 1])
    zero = pairs.metric("kl", reference=logits)
    assert isinstance(zero, Divergence)
    torch.testing.assert_close(zero(logits, rows), torch.zeros(20), atol=1e-6, rtol=0)
    assert bool((zero(logits.flip(0), rows) < -1e-3).any())
    for name in NAMES:
        assert isinstance(pairs.metric(name, reference=logits), Metric)
    with pytest.raises(InterpError, match="needs the logits it compares with"):
        pairs.metric("kl")
    with pytest.raises(InterpError, match="unknown metric 'logitdiff'; these pairs have logit_diff"):
        pairs.metric("logitdiff")


def test_the_own_metric_is_the_default_and_hides_its_namesake(pairs: PromptPairs) -> None:
    own = AnswerSets(right=pairs.answers, wrong=pairs.answers)
    asked = replace(pairs, own=own)
    assert asked.metric() is own and asked.metric("prob_diff") is own
    assert isinstance(asked.metric("logit_diff"), AnswerMetric)
    few = asked.take([3, 7]).own
    assert isinstance(few, AnswerSets) and torch.equal(few.right, pairs.answers[[3, 7]])


def test_means_of_each_sentence(pairs: PromptPairs) -> None:
    named = replace(pairs.take([0, 1, 2]), templates=("a", "b", "a"))
    assert by_template(named, [1.0, 5.0, 2.0]) == {"a": 1.5, "b": 5.0}
    with pytest.raises(InterpError, match="2 values for 3 pairs"):
        by_template(named, [1.0, 2.0])
    with pytest.raises(InterpError, match="0 known sentences"):
        by_template(pairs, [1.0] * 20)
