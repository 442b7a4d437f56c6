"""The codebook method: numbers that can be recomputed, controls that can fail, every way of learning, the disk."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from interp.analyses.codebook import SPEC, codebook_of, run
from interp.core.errors import InterpError
from interp.core.run import Run, load_run, save_run
from interp.dictionaries.splice import splice
from interp.instrument.capture import capture
from interp.instrument.edits import edited
from interp.models.tiny import tiny_model

pytestmark = pytest.mark.needs_package("vector_quantize_pytorch")


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def result(model):
    data, cfg = SPEC.example(model)
    return run(model, data, cfg)


def test_headline_numbers_are_those_of_a_splice_by_hand(model, result):
    data, _ = SPEC.example(model)
    ids, book, site = data.test.ids, codebook_of(result), model.table.one("resid_post.0")

    def loss() -> float:
        log_p = model(ids)[:, :-1].double().log_softmax(-1)
        return float(-log_p.gather(-1, ids[:, 1:, None]).mean())

    assert result.headline["ce_base"] == pytest.approx(loss(), rel=1e-5)
    keep = torch.ones_like(ids, dtype=torch.bool)
    keep[:, 0] = False
    with edited(model, splice(site, book, keep)):
        assert result.headline["ce_codebook"] == pytest.approx(loss(), rel=1e-5)
    with capture(model, site) as acts:
        model(ids)
    x = acts[site][keep].double()
    left = (x - book(x.float()).double()).square().sum() / (x - x.mean(0)).square().sum()
    assert result.headline["fvu"] == pytest.approx(float(left), rel=0.05)  # the mean is that of each evaluation
    assert result.headline["fvu"] < result.headline["fvu_random"]


def test_controls_say_what_the_numbers_say(result):
    assert len(result.controls) == 6
    for control in result.controls:
        assert control.passed == (control.p_value < 0.05)
    by_name = {(c.name, c.statistic.split(" (")[0]): c for c in result.controls}
    zero = by_name["zero ablation", "loss with it spliced in, nats"]
    assert zero.observed == pytest.approx(result.headline["ce_codebook"])
    assert zero.control == pytest.approx(result.headline["ce_zero"])


def test_codes_that_did_not_learn_do_not_pass_against_where_they_started(model):
    data, cfg = SPEC.example(model)
    untrained = run(model, data, replace(cfg, n_steps=1))
    start = next(c for c in untrained.controls if "started from" in c.name)
    assert not start.passed


@pytest.mark.parametrize("learn", ["kl", "ce", "finetune"])
def test_codes_learned_in_the_model(model, learn):
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    data, cfg = SPEC.example(model)
    found = run(model, data, replace(cfg, learn=learn, n_steps=8))
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    assert found.headline["ce_codebook"] < found.headline["ce_zero"] + 1
    assert ("ce_finetuned" in found.headline) == (learn == "finetune")


def test_a_site_with_heads_gets_codes_for_each_head(model):
    data, cfg = SPEC.example(model)
    found = run(model, data, replace(cfg, site="z.0"))
    assert codebook_of(found).codes.shape == (4, 24, 8)


def test_it_survives_the_disk(result, tmp_path):
    loaded = load_run(save_run(tmp_path / "run", Run(results=(result,), facts={}))).results[0]
    x = torch.randn(7, 32)
    assert torch.equal(codebook_of(loaded)(x), codebook_of(result)(x))
    with pytest.raises(InterpError, match="holds no codebook"):
        codebook_of(replace(result, manifest=replace(result.manifest, method="sae")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 64}, "k=64 must lie in 1..n_codes=24"),
        ({"patterns": ("(",)}, "not a regular expression"),
        ({"site": "pattern.0"}, "a store takes sites with axes batch, pos"),
    ],
)
def test_bad_configs_are_named(model, changes, message):
    data, cfg = SPEC.example(model)
    with pytest.raises(InterpError, match=message):
        run(model, data, replace(cfg, **changes))


def test_the_text_must_be_split(model):
    data, cfg = SPEC.example(model)
    with pytest.raises(InterpError, match="the held-out text is the training text"):
        run(model, replace(data, test=data.train), cfg)
    with pytest.raises(InterpError, match="n_eval=1 held-out sequences give no interval"):
        run(model, replace(data, test=data.test.rows([0])), cfg)
