"""Positions: which forms are taken, and what is refused."""

import numpy as np
import pytest
import torch

from interp.core.errors import InterpError
from interp.instrument.capture import capture
from interp.instrument.edits import edited, zero
from interp.instrument.select import selected
from interp.models.calls import Call
from interp.models.tiny import tiny_model

CALL = Call(n_rows=2, n_pos=5, past=0, mask=None, prompt=None)


@pytest.mark.parametrize(
    "at", [3, -2, np.int64(3), np.int32(-2), torch.tensor(3), torch.tensor(-2), [np.int64(3)], [3]]
)
def test_every_whole_number_is_a_position(at: object) -> None:
    chosen = selected(at, "all", CALL, 2, 5)  # pyright: ignore
    assert chosen.tolist() == [[False, False, False, True, False]] * 2


def test_a_range_and_a_mixed_list_are_positions() -> None:
    assert selected(range(1, 3), "all", CALL, 1, 5).tolist() == [[False, True, True, False, False]]
    assert selected([0, np.int64(-1)], "all", CALL, 1, 5).tolist() == [[True, False, False, False, True]]
    assert not selected([], "all", CALL, 1, 5).any()


@pytest.mark.parametrize(
    "at",
    [True, False, [True, False], torch.tensor(True), torch.tensor([1.0, 2.0]), torch.tensor(1.0), np.array([1, 2])],
)
def test_what_is_no_position_is_refused(at: object) -> None:
    with pytest.raises(InterpError, match="are no positions"):
        selected(at, "all", CALL, 2, 5)  # pyright: ignore


def test_numpy_positions_reach_captures_and_edits() -> None:
    model = tiny_model("llama")
    ids = torch.arange(14).view(2, 7)
    with capture(model, "resid_post.0", positions=np.int64(2)) as some:
        model(ids)
    with edited(model, zero("resid_post.0", at=np.int64(2))), capture(model, "resid_post.0") as acts:
        model(ids)
    assert some["resid_post.0"].shape[1] == 1
    assert not acts["resid_post.0"][:, 2].any() and acts["resid_post.0"][:, 3].any()
    with pytest.raises(InterpError, match="outside the input"), capture(model, "resid_post.0", positions=np.int64(7)):
        model(ids)
