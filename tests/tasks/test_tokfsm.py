"""TokFSM: walks keep to the graph, tokens give the states back, and a small model learns the graph."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from interp.core.errors import InterpError
from interp.core.seed import torch_generator
from interp.instrument.tokens import from_ids
from interp.tasks.tokfsm import SEPARATOR, TokFSM, legal, legal_share, next_states, small_model, train_on


@pytest.mark.parametrize(("n_states", "n_edges", "n_digits"), [(100, 10, 2), (7, 2, 1), (101, 101, 3)])
def test_walks_keep_to_the_graph_and_tokens_give_the_states_back(n_states, n_edges, n_digits):
    task = TokFSM.random(n_states, n_edges, seed=3)
    assert (task.allowed.sum(1) == n_edges).all() and task.n_digits == n_digits
    assert task.chance == pytest.approx(n_edges / n_states)
    walks = task.walks(50, 6, generator=torch_generator(0, "test"))
    assert all(task.allowed[a, b] for row in walks.tolist() for a, b in pairwise(row))
    ids = task.written(walks)
    text = "".join(f"{state:0{n_digits}d}|" for state in walks[0].tolist())
    assert "".join("|" if token == SEPARATOR else str(token) for token in ids[0].tolist()) == text
    states = task.states_of(ids).unflatten(1, (6, n_digits + 1))
    assert torch.equal(states[..., -1], walks) and torch.equal(states[..., -2], walks)
    assert (states[..., :-2] == -1).all()
    assert torch.equal(task.states_of(ids[:, :-1]), task.states_of(ids)[:, :-1])  # cut inside a state


def test_successors_are_equally_likely():
    task = TokFSM.random(5, 2, seed=1)
    walks = task.walks(4000, 2, generator=torch_generator(0, "test"))
    shares = torch.stack([(walks[walks[:, 0] == s, 1][:, None] == torch.arange(5)).double().mean(0) for s in range(5)])
    torch.testing.assert_close(shares, task.allowed.double() / 2, atol=0.08, rtol=0)


def test_a_number_that_is_no_state_is_not_legal():
    task = TokFSM.random(12, 12)
    assert legal(task, torch.tensor([0, 3]), torch.tensor([11, 12])).tolist() == [1, 0]


def test_bad_input_is_named():
    with pytest.raises(InterpError, match=r"n_edges=11 must lie in 1..n_states=10"):
        TokFSM.random(10, 11)
    task = TokFSM.random(10, 2)
    model = small_model(task)
    record = task.record(model, 2, 3, seed=0)
    with pytest.raises(InterpError, match="end on a separator"):
        next_states(task, model, from_ids(model, record.ids[:, :-1]))


def test_a_small_model_learns_the_graph():
    """An untrained one is at chance; the trained one writes legal states, and only after the state it was given."""
    task = TokFSM.random(10, 2, seed=0)
    before = small_model(task, d_model=32)
    assert legal_share(task, before, n=400) == pytest.approx(task.chance, abs=0.08)
    after = train_on(task, before, n_steps=200, batch_size=32, n_states=8)
    assert legal_share(task, after, n=400) > 0.9
    record = task.record(after, 400, 8, seed=1)
    other = task.states_of(record.ids)[:, -1].roll(1)  # the last state of another walk
    assert float(legal(task, other, next_states(task, after, record)).mean()) < 0.6  # walks share their busiest states
