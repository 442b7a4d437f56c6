"""Blocks run one by one equal the full forward, from any start, for any rows."""

import pytest
import torch

from interp.core.errors import InterpError
from interp.instrument.blocks import BlockRunner
from interp.instrument.edits import edited, set_to
from interp.models.tiny import tiny_model


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("start", [0, 1, 6])
def test_blocks_one_by_one_equal_the_forward(family: str, start: int) -> None:
    model = tiny_model(family)
    ids = torch.randint(200, (3, 9), generator=torch.Generator().manual_seed(0))
    full = model(ids)
    runner = BlockRunner(model, ids, start=start)
    rows = torch.tensor([2, 0, 1, 2])
    resid = runner.base["resid_pre.0"][rows]
    for layer in range(model.n_layers):
        resid = runner.block(layer, resid, rows)
        torch.testing.assert_close(resid, runner.base[f"resid_post.{layer}"][rows], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(runner.head(resid), full[rows, start:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(runner.logits, full[:, start:], atol=1e-4, rtol=1e-4)


def test_edits_apply_inside_a_block_and_the_runner_stays_as_it_was() -> None:
    model = tiny_model("llama")
    ids = torch.randint(200, (1, 6), generator=torch.Generator().manual_seed(0))
    runner = BlockRunner(model, ids, start=2)
    rows = torch.zeros(2, dtype=torch.long)
    before = runner.base["resid_pre.1"].expand(2, -1, -1)
    with edited(model, set_to("mlp_out.1", 0.0)):
        silent = runner.block(1, before, rows)
    plain = runner.block(1, before, rows)
    torch.testing.assert_close(plain, runner.base["resid_post.1"].expand(2, -1, -1), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(silent, plain)
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.module.modules()) == 0


def test_a_start_outside_the_prompt_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(InterpError, match="positions 0 to 4"):
        BlockRunner(model, torch.zeros(1, 5, dtype=torch.long), start=5)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_later_start_shares_the_run(family: str) -> None:
    model = tiny_model(family)
    ids = torch.randint(200, (3, 12), generator=torch.Generator().manual_seed(1))
    first = BlockRunner(model, ids, start=2)
    for start in (2, 5, 11):
        later = first.later(start)
        assert later.start == start
        rows = torch.tensor([1, 1, 2, 0])
        resid = first.base["resid_pre.0"][rows][:, start - 2 :]
        for layer in range(model.n_layers):
            resid = later.block(layer, resid, rows)
        torch.testing.assert_close(later.head(resid), model(ids)[rows, start:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(first.logits, model(ids)[:, 2:], atol=1e-4, rtol=1e-4)
