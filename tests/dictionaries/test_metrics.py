"""Metrics and baselines against closed forms and against numpy/sklearn-free naive versions."""

from __future__ import annotations

import pytest
import torch

from interp.core.errors import InterpError
from interp.dictionaries.activations.topk import TopK
from interp.dictionaries.base import Dictionary, reconstruct, rows
from interp.dictionaries.baselines import IdentityDictionary, ZeroDictionary, fit_pca, random_dictionary, shuffled_dims
from interp.dictionaries.dictionary import SparseDictionary
from interp.dictionaries.metrics import Moments, evaluate, mean_max_cosine
from interp.dictionaries.sinks import ordinary


def cloud(n: int = 400, d: int = 10) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([5.0, 4.0, 3.0] + [0.5] * (d - 3))
    return torch.randn(n, d, generator=generator) * spread + 100.0  # far from the origin: centring matters


def test_mean_predictor_scores_one_and_perfect_scores_zero():
    x = cloud()
    assert evaluate(ZeroDictionary(x.mean(0)), [x]).fvu == pytest.approx(1.0, abs=1e-9)
    assert evaluate(fit_pca(x, 10), [x]).fvu == pytest.approx(0.0, abs=1e-9)
    zero = evaluate(ZeroDictionary(torch.zeros(10)), [x])
    assert zero.fvu > 100 and zero.l0 == 0.0


def test_fvu_is_that_of_the_definition_for_any_batch_size():
    x = cloud()
    sae = random_dictionary(x, 30, 4, seed=0)
    x_hat = reconstruct(sae, x)
    expected = float((x - x_hat).double().square().sum() / (x.double() - x.double().mean(0)).square().sum())
    for size in (1, 7, 400, 1000):
        scored = evaluate(sae, rows(x, size))
        assert scored.fvu == pytest.approx(expected, rel=1e-5)
        assert scored.n_tokens == 400
    one, many = evaluate(sae, [x]), evaluate(sae, rows(x, 13))
    assert one.l0 == many.l0 and one.dead_fraction == many.dead_fraction and torch.equal(one.density, many.density)


def test_fvu_does_not_drift_with_scale_or_offset():
    x = cloud()
    error = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    values = []
    for scale, offset in ((1.0, 0.0), (30.0, 0.0), (1.0, 500.0)):
        moments = Moments()
        moments.update(scale * x + offset, scale * (x + error) + offset)
        values.append(moments.fvu)
    assert values == pytest.approx([values[0]] * 3, rel=1e-3)


def test_l0_density_and_dead_latents_of_a_hand_made_dictionary():
    sae = SparseDictionary(3, 5, TopK(2))
    with torch.no_grad():
        sae.W_enc[:, :3] = torch.eye(3)
        sae.W_dec[:3] = torch.eye(3)
        sae.b_enc[3:] = -1.0
    x = torch.tensor([[2.0, 1.0, 0.0], [3.0, 0.0, 0.0], [4.0, 0.0, 0.5], [-1.0, -1.0, 7.0]])
    scored = evaluate(sae, [x])
    assert scored.l0 == pytest.approx((2 + 1 + 2 + 1) / 4)
    assert scored.density.tolist() == pytest.approx([0.75, 0.25, 0.5, 0.0, 0.0])
    assert scored.dead_fraction == pytest.approx(2 / 5)


def test_pca_explains_what_the_spectrum_says_and_no_k_directions_do_better():
    x = cloud()
    spectrum = torch.linalg.svdvals(x.double() - x.double().mean(0)).square()
    for k in (1, 3, 9):
        pca = fit_pca(x, k)
        scored = evaluate(pca, [x])
        assert scored.fvu == pytest.approx(float(spectrum[k:].sum() / spectrum.sum()), rel=1e-3)
        assert scored.l0 == k
        torch.testing.assert_close(pca.components @ pca.components.T, torch.eye(k), atol=1e-5, rtol=0)
    rotated = torch.linalg.qr(torch.randn(10, 3, generator=torch.Generator().manual_seed(2))).Q.T
    centred = x - x.mean(0)
    other = (centred - centred @ rotated.T @ rotated).square().sum() / centred.square().sum()
    assert evaluate(fit_pca(x, 3), [x]).fvu < float(other)


def test_random_dictionary_has_the_best_gain():
    x = cloud()
    sae = random_dictionary(x, 30, 4, seed=0)
    best = evaluate(sae, [x]).fvu
    for gain in (0.9, 1.1):
        other = random_dictionary(x, 30, 4, seed=0)
        with torch.no_grad():
            other.W_dec.mul_(gain)
        assert evaluate(other, [x]).fvu > best
    assert best < 1.0
    assert not torch.equal(random_dictionary(x, 30, 4, seed=1).W_dec, sae.W_dec)


def test_sinks_are_dropped_by_norm_and_by_nothing_else():
    x = torch.ones(2, 5, 4)
    x[0, 0] *= 20_000
    x[1, 3] *= 9
    assert ordinary(x, 10.0).tolist() == [[False, True, True, True, True], [True] * 5]
    assert ordinary(x, 5.0)[1, 3].item() is False
    assert bool(ordinary(x, 0.0).all()) and ordinary(x[:0], 10.0).shape == (0, 5)
    assert bool(ordinary(x[0, :1], 10.0, median=2.0).item()) is False
    with pytest.raises(InterpError, match="ratio=-1"):
        ordinary(x, -1.0)


def test_mean_max_cosine():
    eye = torch.eye(4)
    assert mean_max_cosine(eye, 7 * eye[[2, 0, 3, 1]]) == pytest.approx(1.0)
    assert mean_max_cosine(eye, -eye) == pytest.approx(0.0)
    generator = torch.Generator().manual_seed(0)
    chance = mean_max_cosine(torch.randn(256, 64, generator=generator), torch.randn(256, 64, generator=generator))
    assert chance == pytest.approx(0.346, abs=0.01)  # method card: random unit vectors, d = 64, m = 256


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit_pca(cloud(), 11), "k=11 principal components of 10-dimensional"),
        (lambda: fit_pca(cloud(1), 2), "at least 2 activations"),
        (lambda: evaluate(ZeroDictionary(torch.zeros(3)), []), "no activations to evaluate on"),
        (lambda: evaluate(ZeroDictionary(torch.zeros(3)), [torch.ones(4, 3)]), "do not vary"),
        (lambda: evaluate(ZeroDictionary(torch.zeros(3)), [torch.ones(4, 2)]), "d_in=3"),
        (lambda: list(rows(cloud(), 0)), "batch_size=0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InterpError, match=message):
        call()


def test_baselines_are_dictionaries():
    x = cloud()
    assert isinstance(fit_pca(x, 2), Dictionary) and isinstance(ZeroDictionary(x[0]), Dictionary)


def test_reconstruction_metrics_are_those_of_a_loop_for_any_batch_size():
    x = cloud()
    sae = random_dictionary(x, 30, 4, seed=0)
    x_hat = reconstruct(sae, x)
    cosine = sum(float(torch.cosine_similarity(a, b, dim=0)) for a, b in zip(x, x_hat, strict=True)) / 400
    ratio = sum(float(b.norm() / a.norm()) for a, b in zip(x, x_hat, strict=True)) / 400
    gamma = sum(float(b @ b) for b in x_hat) / sum(float(a @ b) for a, b in zip(x, x_hat, strict=True))
    for size in (1, 7, 1000):
        scored = evaluate(sae, rows(x, size))
        assert scored.mse == pytest.approx(float((x - x_hat).square().mean()), rel=1e-4)
        assert scored.cosine == pytest.approx(cosine, rel=1e-5)
        assert scored.norm_ratio == pytest.approx(ratio, rel=1e-5)
        assert scored.gamma == pytest.approx(gamma, rel=1e-5)


def test_gamma_is_the_factor_that_a_least_squares_rescaling_would_undo():
    x = cloud()
    scored = evaluate(fit_pca(x, 10), [x])
    assert scored.gamma == pytest.approx(1.0, abs=1e-6) and scored.cosine == pytest.approx(1.0, abs=1e-6)
    shrunk = Moments()
    shrunk.update(x, 0.8 * x)
    assert shrunk.gamma == pytest.approx(0.8) and shrunk.norm_ratio == pytest.approx(0.8)
    zero = evaluate(ZeroDictionary(torch.zeros(10)), [x])
    assert zero.gamma is None and zero.cosine == 0.0 and zero.norm_ratio == 0.0


def test_dense_latents_and_pairs_of_input_and_target():
    x = torch.zeros(100, 3)
    x[:50, 0], x[:10, 1], x[:2, 2] = 1.0, 1.0, 1.0
    scored = evaluate(IdentityDictionary(3), [x])
    assert scored.dense_fraction == pytest.approx(1 / 6) and scored.dead_fraction == pytest.approx(1 / 2)
    assert scored.fvu == pytest.approx(0.0)
    target = 2 * x
    assert evaluate(IdentityDictionary(3), [(x, target)]).norm_ratio == pytest.approx(0.5 * 0.5)  # half the rows are 0
    assert evaluate(IdentityDictionary(3), [(x, x), (x, x)]).n_tokens == 200


def test_the_identity_dictionary_splits_signs():
    x = torch.tensor([[1.0, -2.0, 0.0]])
    identity = IdentityDictionary(3)
    assert identity.encode(x).dense().tolist() == [[1.0, 0.0, 0.0, 0.0, 2.0, 0.0]]
    assert torch.equal(identity.decode(identity.encode(x)), x)
    torch.testing.assert_close(identity.encode(x).dense() @ identity.features, x)


def test_shuffled_dimensions_keep_marginals_and_lose_correlations():
    x = cloud(2000)
    x[:, 1] = x[:, 0]
    shuffled = shuffled_dims(x, seed=0)
    assert torch.equal(shuffled.sort(0).values, x.sort(0).values)
    assert abs(float(torch.corrcoef(shuffled.T)[0, 1])) < 0.1 and float(torch.corrcoef(x.T)[0, 1]) > 0.99
    assert torch.equal(shuffled_dims(x, seed=0), shuffled) and not torch.equal(shuffled_dims(x, seed=1), shuffled)
