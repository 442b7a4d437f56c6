"""Fidelity against closed forms (identity, zero, mean), the older scores, and naive loops."""

from __future__ import annotations

import pytest
import torch

from interp.core.errors import InterpError
from interp.dictionaries.activations.topk import TopK
from interp.dictionaries.baselines import IdentityDictionary, ZeroDictionary, fit_pca, random_dictionary
from interp.dictionaries.dictionary import SparseDictionary
from interp.dictionaries.heldout import HeldOut, held_out, score
from interp.dictionaries.judge.fidelity import density_histogram, model_ratios, reconstruction, spliced
from interp.instrument.edits import edited, set_to
from interp.instrument.tokens import TokenRecord, tokenize
from interp.models.model import LoadedModel
from interp.models.tiny import tiny_model


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def data(model: LoadedModel) -> HeldOut:
    texts = ["gates open and close", "a dictionary", "of few directions", "xyzw and so on"]
    record = tokenize(model, texts, pad="right")
    return held_out(model, record, model.table.one("resid_post.1"), drop_norm=10.0, median=1e9)


def values(dictionary, data) -> dict[str, float | None]:
    found = reconstruction(dictionary, data)
    return {name: ratio.value for name, ratio in found.ratios.items()} | found.latents


def test_perfect_mean_and_zero(data):
    perfect = values(IdentityDictionary(32), data)
    assert perfect["fvu"] == 0.0 and perfect["mse"] == 0.0
    assert perfect["cosine"] == pytest.approx(1.0) and perfect["gamma"] == pytest.approx(1.0)
    assert perfect["l0"] == pytest.approx(32, abs=1e-3) and perfect["norm_ratio"] == pytest.approx(1.0)
    mean = values(ZeroDictionary(data.tokens.mean(0)), data)
    assert mean["fvu"] == pytest.approx(1.0, abs=1e-6) and mean["l0"] == 0.0 and mean["dead_fraction"] is None
    zero = values(ZeroDictionary(torch.zeros(32)), data)
    assert zero["fvu"] is not None and zero["fvu"] > 1.0
    assert zero["gamma"] is None and zero["cosine"] == 0.0


def test_values_agree_with_the_scores_that_know_no_sequences(model, data):
    sae = random_dictionary(data.tokens, 64, 4, seed=0)
    found, old = values(sae, data), score(model, data, {"sae": sae})[0]["sae"].evaluation
    for name in ("fvu", "mse", "cosine", "norm_ratio", "gamma", "l0", "dead_fraction", "dense_fraction"):
        assert found[name] == pytest.approx(getattr(old, name), rel=1e-5), name
    torch.testing.assert_close(reconstruction(sae, data).density, old.density)


def test_losses_agree_with_the_older_scores_and_the_identity_costs_nothing(model, data):
    sae = random_dictionary(data.tokens, 64, 4, seed=0)
    zero, mean = ZeroDictionary(torch.zeros(32)), ZeroDictionary(data.tokens.mean(0))
    everyone = {"sae": sae, "identity": IdentityDictionary(32), "zero": zero, "mean": mean}
    found, base = spliced(model, data, everyone)
    old, old_base = score(model, data, {"sae": sae, "zero": zero})
    assert float(base.ce.sum() / base.n_predicted.sum()) == pytest.approx(float(old_base.mean()), rel=1e-6)
    for name in ("sae", "zero"):
        ours = float(found[name].ce.sum() / found[name].n_predicted.sum())
        assert ours == pytest.approx(float(old[name].ce.mean()), rel=1e-6)
    assert float(base.kl.abs().max()) == 0.0
    ratios = {name: model_ratios(one, base, found["zero"], found["mean"]) for name, one in found.items()}
    assert ratios["identity"]["kl"].value == pytest.approx(0.0, abs=1e-6)
    assert ratios["identity"]["ce_increase"].value == pytest.approx(0.0, abs=1e-6)
    for name in ("kl_recovered", "kl_recovered_mean"):
        assert ratios["identity"][name].value == pytest.approx(1.0, abs=1e-5)
    assert ratios["zero"]["kl_recovered"].value == 0.0 and ratios["mean"]["kl_recovered_mean"].value == 0.0


def test_divergence_is_torchs_own(model, data):
    zero = ZeroDictionary(torch.zeros(32))
    found, _ = spliced(model, data, {"zero": zero})
    base = model(data.record)
    with edited(model, set_to(data.site, 0.0, at=data.keep)):
        ablated = model(data.record)
    for row in range(len(data.record)):
        n = int(data.record.mask[row].sum()) - 1
        expected = torch.nn.functional.kl_div(
            ablated[row, :n].double().log_softmax(-1), base[row, :n].double().log_softmax(-1),
            log_target=True, reduction="sum",
        )  # fmt: skip
        assert float(found["zero"].kl[row]) == pytest.approx(float(expected), rel=1e-4)
        assert float(found["zero"].n_predicted[row]) == n


def test_the_batch_size_does_not_matter(model, data):
    sae = random_dictionary(data.tokens, 64, 4, seed=0)
    one, _ = spliced(model, data, {"sae": sae}, batch_size=1)
    all_, _ = spliced(model, data, {"sae": sae}, batch_size=4)
    torch.testing.assert_close(one["sae"].ce, all_["sae"].ce, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one["sae"].kl, all_["sae"].kl, rtol=1e-3, atol=1e-4)


def test_firings_per_sequence_of_a_hand_made_case(model):
    record = TokenRecord(
        ids=torch.zeros(3, 4, dtype=torch.long), mask=torch.ones(3, 4, dtype=torch.bool),
        special=torch.zeros(3, 4, dtype=torch.bool), strings=(("a",) * 4,) * 3,
    )  # fmt: skip
    x = torch.zeros(3, 4, 5)
    x[0, :, 0] = 1.0  # a topic: four times in one text
    x[:, 1, 1] = 1.0  # a word: once in each text
    x[0, 3, 2] = 1.0
    held = HeldOut(record=record, site=model.table.one("resid_post.0"), x=x, keep=record.mask)
    sae = SparseDictionary(5, 5, TopK(5))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(5))
        sae.W_dec.copy_(torch.eye(5))
    found = reconstruction(sae, held)
    assert found.firings.tolist() == [4, 3, 1, 0, 0] and found.sequences.tolist() == [1, 3, 1, 0, 0]
    assert found.latents["firings_per_sequence"] == 1.0  # median of 4, 1, 1
    assert found.latents["dead_fraction"] == pytest.approx(0.4)
    assert found.latents["dense_fraction"] == pytest.approx(0.4)
    table = density_histogram(found.density, n_bins=5)
    assert int(table["n_latents"].sum()) == 3


def test_a_target_other_than_the_input(model, data):
    doubled = HeldOut(record=data.record, site=data.site, x=2 * data.x, keep=data.keep)
    found = reconstruction(IdentityDictionary(32), data, doubled)
    assert found.ratios["norm_ratio"].value == pytest.approx(0.5)
    other = HeldOut(record=data.record, site=data.site, x=data.x, keep=torch.ones_like(data.keep))
    with pytest.raises(InterpError, match="the same tokens"):
        reconstruction(IdentityDictionary(32), data, other)


def test_pca_is_better_with_more_components(data):
    fvu = [values(fit_pca(data.tokens, k), data)["fvu"] for k in (1, 4, 16, 32)]
    assert fvu == sorted(fvu, reverse=True) and fvu[-1] == pytest.approx(0.0, abs=1e-6)
