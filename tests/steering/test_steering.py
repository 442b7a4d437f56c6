"""The method: choice within the budget, halves kept apart, replay, refusals; and the real model beats its controls."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from interp.core.errors import InterpError
from interp.core.run import Run, load_run, save_run
from interp.core.spec import build_config, find
from interp.models.load import load
from interp.models.model import LoadedModel
from interp.models.tiny import tiny_model
from interp.steering.evaluate import Batch, Neutral, batches, propensities, readout, slope, steerable
from interp.steering.steering import SPEC, SteeringConfig
from interp.steering.sweep import Sweep, find_directions
from interp.steering.vectors import extract, from_result
from interp.tasks.corpora import load_corpus
from interp.tasks.sentiment import sentiment_pairs


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_model("llama")


def made_sweep(effect: list[list[float]], kl: list[list[float]]) -> Sweep:
    values = torch.tensor(effect, dtype=torch.float64)[..., None].expand(-1, -1, 3)
    cost = torch.stack([torch.tensor(kl), torch.ones(2, 3)], dim=-1).double()
    return Sweep(layers=(4, 8), strengths=(-1.0, 1.0, 2.0), base=torch.zeros(3).double(), values=values, cost=cost)


def test_the_choice_is_the_largest_effect_within_the_budget() -> None:
    made = made_sweep([[9, 1, 2], [-3, 3, 8]], [[0.0, 0.1, 0.2], [0.1, 0.3, 0.9]])
    assert made.choose(0.25) == (4, 2.0, True)
    assert made.choose(0.5) == (8, 1.0, True)
    assert made.choose(1.0) == (8, 2.0, True)
    assert made.choose(0.01) == (4, 1.0, False)


def test_slopes_of_known_lines() -> None:
    made = made_sweep([[-2, 2, 4], [1, -1, -2]], [[0.1] * 3] * 2)
    table = made.slopes().set_index("layer")
    assert table["slope"].round(6).tolist() == [2.0, -1.0]
    assert table["anti_steerable"].tolist() == [0.0, 1.0]


def test_it_is_found_and_its_example_runs_and_saves(model: LoadedModel, tmp_path: Path) -> None:
    assert find("steering") is SPEC
    data, cfg = SPEC.example(model)
    result = SPEC.run(model, data, cfg)
    assert {"site", "effect", "control_p95", "kl_neutral", "strength"} <= set(result.headline)
    assert len(result.controls) == 5 and result.manifest.seeds == (0,)
    again = load_run(save_run(tmp_path / "run", Run(results=(result,), facts={}))).results[0]
    assert again.headline == result.headline
    for name, table in result.tables.items():
        pd.testing.assert_frame_equal(again.tables[name], table)


def test_the_chosen_vector_is_the_one_that_extract_makes(model: LoadedModel) -> None:
    data, cfg = SPEC.example(model)
    result = SPEC.run(model, data, cfg)
    found = from_result(result)
    layer = int(found.site.rpartition(".")[2])
    made = extract(model, data.pairs, layer, neutral=data.neutral, strength=found.strength)
    torch.testing.assert_close(found.scaled(), made.scaled())
    assert abs(found.difference_norm - made.difference_norm) < 1e-3 * made.difference_norm
    assert (found.pairs_hash, found.weight_hash) == (made.pairs_hash, model.weight_hash)
    with pytest.raises(InterpError, match="holds no steering vector"):
        from_result(replace(result, manifest=replace(result.manifest, method="other")))


def test_it_repeats_and_the_seed_moves_only_the_controls(model: LoadedModel) -> None:
    data, cfg = SPEC.example(model)
    first, same = SPEC.run(model, data, cfg).headline, SPEC.run(model, data, cfg).headline
    other = SPEC.run(model, data, replace(cfg, seed=1)).headline
    assert first == same
    assert first["effect"] == other["effect"] and first["control_p95"] != other["control_p95"]


def test_reported_numbers_come_from_the_other_half(model: LoadedModel) -> None:
    data, cfg = SPEC.example(model)
    chosen_on = replace(data.pairs, prompts=("Other words were", "Some more were", *data.pairs.prompts[2:]))
    result, moved = (SPEC.run(model, d, cfg) for d in (data, replace(data, pairs=chosen_on)))
    assert not result.tables["sweep"]["effect"].equals(moved.tables["sweep"]["effect"])
    assert tuple(result.tables["prompts"]["prompt"]) == data.pairs.prompts[2:]
    if result.headline["site"] == moved.headline["site"]:
        pd.testing.assert_frame_equal(result.tables["prompts"], moved.tables["prompts"])


def test_a_reversed_contrast_reverses_the_direction(model: LoadedModel) -> None:
    data, cfg = SPEC.example(model)
    turned = replace(data.pairs, positive=data.pairs.negative, negative=data.pairs.positive)
    cfg = replace(cfg, depths=(0.9,), strengths=(-0.5, 0.5))
    plain, back = (SPEC.run(model, d, cfg).tables["sweep"] for d in (data, replace(data, pairs=turned)))
    torch.testing.assert_close(
        torch.tensor(plain["effect"].tolist()), torch.tensor(back["effect"].tolist()[::-1]), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"depths": "1.5"}, "fractions of the depth"),
        ({"strengths": "-0.1"}, "one at least positive"),
        ({"strengths": "0.1,0.1"}, "different"),
        ({"n_random": 1}, "at least 2"),
        ({"kl_budget": 0.0}, "above 0"),
        ({"method": "median"}, "unknown method"),
    ],
)
def test_bad_options_are_refused(model: LoadedModel, options: dict[str, object], hint: str) -> None:
    with pytest.raises(InterpError, match=hint):
        SPEC.run(model, SPEC.example(model)[0], build_config(SteeringConfig, options))


@pytest.mark.needs_model("smollm2-135m")
def test_slopes_by_layer_are_those_of_the_method_card() -> None:
    """Raw differences at c = -1, 0, 1: slope 6.6 and 2.9, KL 0.51 and 0.15 at layers 20 and 26 there."""
    model = load("smollm2-135m", check=False)
    pairs, layers = sentiment_pairs(40, 8), [2, 17, 20, 26]
    reading, prompts = readout(model, pairs.words_for, pairs.words_against), batches(model, pairs.prompts)
    record = load_corpus(model, "docs:assignment", 1, 64)
    neutral = Neutral(Batch(model, record, steerable(model, record), (0,)))
    found = find_directions(model, pairs, layers, neutral.batch, method="mean", seed=0)
    doses = torch.tensor([-1.0, 0.0, 1.0])
    slopes: dict[int, float] = {}
    costs: dict[int, float] = {}
    for layer, raw in zip(layers, found.raw, strict=True):
        values = propensities(prompts, reading, f"resid_post.{layer}", doses[:, None] * raw)
        each = slope(doses, values)
        slopes[layer], costs[layer] = float(each.mean()), float(neutral.cost(f"resid_post.{layer}", raw[None])[0, 0])
        assert (each > 0).all()
    assert 5 < slopes[20] < 9 and 2.5 < slopes[26] < 5 and slopes[17] < 0.6 * slopes[20]
    assert costs[26] < 0.3 < costs[20] < 1 < costs[2]
    assert found.table["split_half"].min() > 0.9 and (found.table["cosine_to_pca"] > 0.95).all()
    assert found.table["relative_norm"].is_monotonic_decreasing


@pytest.mark.needs_model("smollm2-135m")
def test_on_a_real_model_the_vector_beats_random_ones() -> None:
    model = load("smollm2-135m", check=False)
    cfg = SteeringConfig(depths=(0.8,), strengths=(-0.2, 0.2), n_pairs=20, n_prompts=8, n_random=10, n_neutral=1)
    result = SPEC.run(model, SPEC.load(model, cfg), cfg)
    head = result.headline
    assert head["site"] == "resid_post.24" and head["strength"] == 0.2
    assert 2.5 < head["effect"] < 7.5  # 4.9 measured
    assert head["control_p95"] < 0.5 * head["effect"]
    assert 0.03 < head["kl_neutral"] < 0.3  # 0.13 measured
    assert head["split_half_cosine"] > 0.9 and head["anti_steerable"] == 0
    assert all(control.passed for control in result.controls)
