"""Edits over several calls: what is random stays with its row while a generation runs; sizes known only then."""

import pytest
import torch
from torch import Tensor

from interp.core.errors import InterpError
from interp.instrument.capture import capture
from interp.instrument.edits import edited, resample, zero
from interp.models.model import LoadedModel
from interp.models.tiny import tiny_model


def tokens(model: LoadedModel, shape: tuple[int, int] = (2, 7), seed: int = 0) -> Tensor:
    return torch.randint(model.dims.d_vocab or 0, shape, generator=torch.Generator().manual_seed(seed))


def pool(model: LoadedModel, n: int = 50) -> Tensor:
    """Row i of the pool is i everywhere, so a value says which row it was."""
    return torch.arange(float(n))[:, None, None].expand(n, 12, model.dims.d_model or 0)


@pytest.mark.parametrize("use_cache", [True, False])
def test_resample_keeps_its_rows_for_a_whole_generation(use_cache: bool) -> None:
    model = tiny_model("llama")
    with edited(model, resample("resid_post.1", pool(model), seed=3)), capture(model, "resid_post.1") as acts:
        model.generate(tokens(model), n_new=4, use_cache=use_cache)
    values = acts["resid_post.1"]
    assert values.shape[1] == 7 + 3
    assert all(len(values[row].unique()) == 1 for row in range(2))


def test_resample_does_not_depend_on_the_cache_and_changes_with_the_generation() -> None:
    model = tiny_model("llama")
    found = {}
    for use_cache in (True, False):
        with edited(model, resample("resid_post.1", pool(model), seed=3)), capture(model, "resid_post.1") as acts:
            first = model.generate(tokens(model), n_new=4, use_cache=use_cache)
            model.generate(tokens(model), n_new=4, use_cache=use_cache)
        found[use_cache] = [first, *acts.calls("resid_post.1")]
    for cached, whole in zip(found[True], found[False], strict=True):
        assert torch.equal(cached, whole)
    assert not torch.equal(found[True][1][:, 0], found[True][2][:, 0])


def test_resample_draws_anew_for_each_forward() -> None:
    model = tiny_model("llama")
    with edited(model, resample("resid_post.1", pool(model), seed=3)), capture(model, "resid_post.1") as acts:
        for _ in range(4):
            model(tokens(model))
    drawn = [tuple(value[:, 0, 0].tolist()) for value in acts.calls("resid_post.1")]
    assert len(set(drawn)) > 1


@pytest.mark.parametrize("site", ["pattern.1", "attn_scores.1"])
def test_keys_out_of_range_are_refused_when_their_number_is_known(site: str) -> None:
    model = tiny_model("llama")
    with edited(model, zero(site, dims=6)):
        model(tokens(model))
    with pytest.raises(InterpError, match="dims 0 to 6"), edited(model, zero(site, dims=7)):
        model(tokens(model))
    with pytest.raises(InterpError, match="dims 0 to 6"), edited(model, zero(site, dims=[0, -1])):
        model(tokens(model))


def test_dims_of_a_module_path_are_checked_too() -> None:
    model = LoadedModel(torch.nn.Sequential(torch.nn.Linear(2, 3)))
    with pytest.raises(InterpError, match="dims 0 to 2"), edited(model, zero("0", dims=3)):
        model(torch.ones(1, 2))


@pytest.mark.parametrize(("name", "value"), [("num_beams", 2), ("num_return_sequences", 3), ("do_sample", True)])
def test_decoding_that_is_not_one_greedy_row_per_prompt_is_refused(name: str, value: object) -> None:
    model = tiny_model("llama")
    with capture(model, "z.1", stop=False) as acts, edited(model, zero("z.1")):
        with pytest.raises(InterpError, match=rf"generate\({name}={value}\): decoding here is greedy"):
            model.generate(tokens(model), n_new=2, **{name: value})
        model.generate(tokens(model), n_new=2, repetition_penalty=1.5)
    assert acts["z.1"].shape[1] == 8
