"""Massive activations: planted ones are found, the rules hold, and the reference numbers of a real model."""

from dataclasses import replace

import pytest
import torch

from interp.analyses.massive import SPEC, MassiveConfig, MassiveData, example, losses_of, run
from interp.analyses.massive_scan import Spot, largest, scan
from interp.core.errors import InterpError
from interp.core.sites import Part, Site
from interp.instrument.edits import add, edited, scale, set_to, zero
from interp.instrument.tokens import TokenRecord, from_ids, tokenize
from interp.models.load import load
from interp.models.tiny import tiny_model
from interp.tasks.corpora import load_corpus


def record(model, shape=(3, 8), seed=0) -> TokenRecord:
    return from_ids(model, torch.randint(200, shape, generator=torch.Generator().manual_seed(seed)))


def spot(layer: int, value: float, *, sequence: int = 0, pos: int = 2, dim: int = 5) -> Spot:
    size = abs(value)
    return Spot(
        layer=layer, sequence=sequence, rank=1, start=True, pos=pos, token="x", dim=dim, value=value, median=1.0,
        ratio=size, massive=size >= 1000,
    )  # fmt: skip


def test_a_planted_coordinate_is_found_with_its_value_and_ratio() -> None:
    model = tiny_model("llama")
    text = record(model)
    with edited(model, set_to("resid_post.1", -50_000.0, at=3, dims=7)):
        spots = scan(model, text, 1000.0, 100.0)
        place = largest(spots)
    first = [s for s in spots if s.layer == 1 and s.rank == 1 and s.start]
    assert (place.site, place.pos, place.dim) == (Site(Part.RESID_POST, 1), 3, 7)
    assert place.value == pytest.approx(-50_000.0)
    assert place.massive
    assert place.share == 1.0
    assert all(s.ratio == pytest.approx(50_000 / s.median) for s in first)
    assert not any(s.massive for s in spots if s.layer == 0)


def test_ratios_do_not_depend_on_the_scale() -> None:
    model = tiny_model("llama")
    text = record(model)
    plain = scan(model, text, 1000.0, 0.0)
    with edited(model, scale("resid_post.2", 7.0)):
        scaled = scan(model, text, 1000.0, 0.0)
    for a, b in zip(plain, scaled, strict=True):
        if a.layer == 2:
            assert (a.pos, a.dim) == (b.pos, b.dim)
            assert b.value == pytest.approx(7 * a.value, rel=1e-5)
            assert b.ratio == pytest.approx(a.ratio, rel=1e-5)


def test_the_scan_without_the_first_position_leaves_it_out() -> None:
    model = tiny_model("llama")
    with edited(model, set_to("resid_post.0", 9000.0, at=0, dims=1)):
        spots = scan(model, record(model), 10.0, 1.0)
    here = [s for s in spots if s.layer == 0 and s.rank == 1]
    assert all(s.pos == 0 for s in here if s.start)
    assert all(s.pos > 0 and abs(s.value) < 9000 for s in here if not s.start)


def test_padding_is_never_reported() -> None:
    model = tiny_model("llama")
    text = tokenize(model, ["abcdef", "abc"], pad="right")
    with edited(model, set_to("resid_post.1", 9000.0, at=-1)):
        spots = scan(model, text, 10.0, 1.0)
    assert all(s.pos < 3 for s in spots if s.sequence == 1)
    assert any(s.pos == 5 for s in spots if s.sequence == 0)


def test_the_site_is_the_first_layer_with_half_of_the_peak() -> None:
    spots = [spot(0, 10.0), spot(1, 499.0), spot(2, 500.0), spot(3, 1000.0), spot(4, 900.0, pos=1)]
    assert largest(spots).site == Site(Part.RESID_POST, 2)
    both = [spot(0, 3.0), spot(0, -5.0, sequence=1, dim=6), spot(0, 4.0, sequence=2)]
    place = largest(both)
    assert place.dim == 6
    assert place.share == pytest.approx(1 / 3)


def test_losses_are_those_of_transformers() -> None:
    model = tiny_model("llama")
    text = record(model)
    expected = [
        float(model.module(input_ids=row[None], labels=row[None]).loss.detach()) for row in text.ids
    ]  # transformers' own shifted cross-entropy
    torch.testing.assert_close(losses_of(model, text, None), torch.tensor(expected))
    assert torch.equal(losses_of(model, text, add("resid_post.1", torch.zeros(32))), losses_of(model, text, None))
    assert not torch.allclose(losses_of(model, text, zero("resid_post.1")), torch.tensor(expected))


def test_a_planted_constant_bias_passes_every_control() -> None:
    """A start token whose embedding holds one huge coordinate, which every norm divides by and no weight reads.

    Removing it lets the rest of position 0 through; its mean, other positions and ordinary dims then change nothing.
    """
    model = tiny_model("llama")
    data, cfg = example(model)
    with torch.no_grad():
        for name, weight in model.module.named_parameters():
            if "norm" in name:
                weight[7] = 0.0
        model.module.get_parameter("model.embed_tokens.weight")[256, 7] = 30_000.0
    text, calibration = (
        from_ids(model, torch.cat([torch.full((len(part), 1), 256), part.ids[:, 1:]], dim=1))
        for part in (data.text, data.calibration)
    )
    result = run(model, MassiveData(text=text, calibration=calibration), cfg)
    headline = result.headline
    assert (headline["site"], headline["pos"], headline["dim"]) == ("resid_post.0", 0, 7)
    assert headline["value"] == pytest.approx(30_000, rel=1e-3)
    assert headline["share_of_sequences"] == 1.0
    assert abs(headline["loss_zeroed"] - headline["loss_base"]) > 0.01
    assert headline["loss_mean"] == pytest.approx(headline["loss_base"], abs=1e-4)
    assert [control.passed for control in result.controls] == [True] * 4
    assert not any("no massive" in note for note in result.notes)


def test_a_random_model_says_that_there_is_none() -> None:
    model = tiny_model("gpt2")
    result = SPEC.run(model, *example(model))
    assert any("no massive activation" in note for note in result.notes)
    assert not all(control.passed for control in result.controls)


def test_bad_input_is_refused() -> None:
    model = tiny_model("llama")
    data, cfg = example(model)
    with pytest.raises(InterpError, match="n_draws=0"):
        run(model, data, replace(cfg, n_draws=0))
    with pytest.raises(InterpError, match="at least 2"):
        run(model, MassiveData(text=record(model, (2, 1)), calibration=data.calibration), cfg)
    with pytest.raises(InterpError, match="calibration text is the scored text"):
        run(model, MassiveData(text=data.text, calibration=data.text), cfg)


@pytest.mark.needs_model("smollm2-135m")
def test_reference_numbers() -> None:
    model = load("smollm2-135m", check=False)
    cfg = MassiveConfig(n_draws=1)
    data = SPEC.load(model, cfg)
    assert torch.equal(data.text.ids, load_corpus(model, "docs:assignment", 6, 128).ids)
    result = run(model, data, cfg)
    headline = result.headline
    assert (headline["site"], headline["pos"], headline["dim"]) == ("resid_post.11", 0, 507)
    assert 20_000 < headline["value"] < 25_000
    assert headline["loss_base"] == pytest.approx(3.143, abs=0.01)
    assert headline["loss_zeroed"] > 10
    assert abs(headline["loss_mean"] - headline["loss_base"]) < 0.01
    assert all(control.passed for control in result.controls)
    spots = result.tables["spots"]
    elsewhere = spots[(spots["layer"] == 11) & ~spots["start"]]
    assert float(elsewhere["value"].abs().max()) < 150
    ordinary = losses_of(model, data.text, zero("resid_post.11", at=0, dims=100)).mean()
    assert abs(float(ordinary) - headline["loss_base"]) < 0.03
