"""Metrics on logits whose numbers can be worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from interp.core.errors import InterpError
from interp.tasks.metrics import AnswerMetric, AnswerSets, Divergence, Metric, UserMetric

P = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4]])
LOGITS = torch.stack([torch.zeros(2, 4), P.log() + 7.0], dim=1)  # two positions; the last one holds P
ANSWERS = torch.tensor([[0, 1], [3, 0]])
BOTH = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("logit_diff", [math.log(2), math.log(4)]),
        ("prob", [0.5, 0.4]),
        ("log_prob", [math.log(0.5), math.log(0.4)]),
    ],
)
def test_answers(name, expected):
    metric = AnswerMetric(name=name, answers=ANSWERS)
    assert isinstance(metric, Metric)
    assert metric(LOGITS, BOTH).tolist() == pytest.approx(expected, rel=1e-6)
    assert metric(LOGITS.flip(0), BOTH.flip(0)).tolist() == pytest.approx(expected[::-1], rel=1e-6)
    assert metric.take([1])(LOGITS[1:], torch.tensor([0])).tolist() == pytest.approx(expected[1:], rel=1e-6)


def test_sets_of_answers():
    metric = AnswerSets(right=torch.tensor([[0, -1], [2, 3]]), wrong=torch.tensor([[1, 2], [0, -1]]))
    assert metric(LOGITS, BOTH).tolist() == pytest.approx([0.5 - 0.375, 0.7 - 0.1])
    assert metric.take([1])(LOGITS[1:], torch.tensor([0])).tolist() == pytest.approx([0.6])


def test_divergence():
    metric = Divergence(reference=LOGITS[:, -1:].log_softmax(-1))
    assert metric(LOGITS, BOTH).tolist() == pytest.approx([0, 0], abs=1e-6)
    swapped = metric(LOGITS, BOTH.flip(0))
    by_hand = -sum(q * math.log(q / p) for p, q in zip(P[0].tolist(), P[1].tolist(), strict=True))
    assert float(swapped[0]) == pytest.approx(by_hand, rel=1e-5)
    assert float(metric.take([1])(LOGITS[:1], torch.tensor([0]))[0]) == pytest.approx(by_hand, rel=1e-5)
    whole = Divergence(reference=LOGITS.log_softmax(-1))
    assert whole.n_last == 2 and float(whole(LOGITS, BOTH.flip(0))[0]) == pytest.approx(by_hand, rel=1e-5)


def test_a_function_of_the_user():
    metric = UserMetric(name="own", function=lambda logits, rows: logits[:, -1, 0] * 0 + rows)
    assert metric.take([1, 0]).take([0])(LOGITS[:1], torch.tensor([0])).tolist() == [1]
    with pytest.raises(InterpError, match=r"gave shape \(2, 4\), expected \(2,\)"):
        UserMetric(name="wide", function=lambda logits, _: logits[:, -1])(LOGITS, BOTH)
    with pytest.raises(InterpError, match="logit_diff"):
        AnswerMetric(name="logit_dif", answers=ANSWERS)
