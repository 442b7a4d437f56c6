"""Planted features: the generator does what it says, and recovery tells the truth from chance."""

from __future__ import annotations

import pytest
import torch

from interp.core.errors import InterpError
from interp.dictionaries.activations.topk import TopK
from interp.dictionaries.dictionary import SparseDictionary
from interp.dictionaries.judge.planted import correlations, matched_correlation, planted, recovery
from interp.dictionaries.metrics import chance_max_cosine


def holding(features: torch.Tensor, k: int) -> SparseDictionary:
    """A dictionary whose directions are given."""
    sae = SparseDictionary(features.shape[1], len(features), TopK(k))
    with torch.no_grad():
        sae.W_dec.copy_(features)
        sae.W_enc.copy_(features.T)
    return sae


def test_each_token_has_its_features_and_is_their_sum():
    truth = planted(40, 12, n_active=3, seed=0)
    x, codes = truth.sample(500, seed=1)
    assert torch.equal((codes > 0).sum(1), torch.full((500,), 3))
    active = codes[codes > 0]
    assert float(active.min()) >= 0.5 and float(active.max()) <= 1.5
    assert float(active.mean()) == pytest.approx(1.0, abs=0.03)
    by_hand = torch.stack([sum(codes[t, i] * truth.features[i] for i in codes[t].nonzero()[:, 0]) for t in range(20)])
    torch.testing.assert_close(x[:20], by_hand)
    torch.testing.assert_close(truth.features.norm(dim=1), torch.ones(40))
    assert torch.equal(truth.sample(500, seed=1)[0], x) and not torch.equal(truth.sample(500, seed=2)[0], x)


def test_frequencies_follow_the_weights():
    even, skewed = planted(30, 8, n_active=1, skew=0.0), planted(30, 8, n_active=1, skew=1.0)
    n = 60_000
    rate = (skewed.sample(n, seed=0)[1] > 0).double().mean(0)
    expected = (1 / torch.arange(1, 31, dtype=torch.float64)) / (1 / torch.arange(1, 31, dtype=torch.float64)).sum()
    torch.testing.assert_close(rate, expected, atol=0.006, rtol=0.1)  # one draw: rates are the weights themselves
    flat = (even.sample(n, seed=0)[1] > 0).double().mean(0)
    torch.testing.assert_close(flat, torch.full_like(flat, 1 / 30), atol=0.004, rtol=0)


def test_a_child_never_fires_without_its_parent():
    truth = planted(60, 16, n_active=3, children=0.5, seed=0)
    _, codes = truth.sample(4000, seed=0)
    child = truth.parents >= 0
    assert int(child.sum()) == 30 and int(truth.parents.max()) < 30
    on = codes > 0
    assert bool(on[:, child].any())
    assert not bool((on[:, child] & ~on[:, truth.parents[child]]).any())
    alone = on[:, ~child].sum() - on[:, truth.parents[child]].sum()
    assert int(alone) != 0
    assert float(on.sum(1).double().mean()) > 3.0


def test_the_true_dictionary_recovers_everything_and_a_random_one_is_at_chance():
    """Orthogonal features, so that the tied encoder reads every code exactly."""
    truth = planted(16, 16, n_active=3, skew=0.3, seed=0)
    basis = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0))).Q
    exact = type(truth)(features=basis, weights=truth.weights, parents=truth.parents, n_active=3)
    shuffled = basis[torch.randperm(16, generator=torch.Generator().manual_seed(1))]
    found = recovery(exact, holding(7 * shuffled, 3), n_tokens=2000)
    assert found.mmcs == pytest.approx(1.0) and found.recovered == 1.0 and found.n_absent == 0
    assert found.mcc == pytest.approx(1.0, abs=1e-5)
    assert found.mcc_chance < 0.1
    assert found.mmcs_chance < 0.6
    random = recovery(exact, SparseDictionary.random(16, 16, TopK(3), seed=5), n_tokens=2000)
    assert random.mmcs == pytest.approx(found.mmcs_chance, abs=0.1) and random.recovered == 0.0
    half = basis.clone()
    half[:8] = basis[8:]  # features 0..7 are missing, 8..15 are there twice
    partly = recovery(exact, holding(half, 3), n_tokens=2000)
    assert partly.recovered == 0.5 and partly.mcc < 0.75


def test_chance_of_mmcs_is_that_of_the_method_card():
    truth = planted(256, 64, seed=3).features
    assert chance_max_cosine(truth, 256) == pytest.approx(0.346, abs=0.01)
    assert chance_max_cosine(truth, 1024) == pytest.approx(0.395, abs=0.01)


def test_correlation_is_numpys_and_the_matching_is_one_to_one():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(50, 4, generator=generator), torch.rand(50, 6, generator=generator)
    import numpy as np

    expected = np.corrcoef(a.numpy(), b.numpy(), rowvar=False)[:4, 4:]
    torch.testing.assert_close(correlations(a, b), torch.from_numpy(expected), atol=1e-6, rtol=1e-5)
    b[:, 0] = 1.0
    assert float(correlations(a, b)[:, 0].abs().max()) == 0.0
    copies = torch.stack([a[:, 0], a[:, 0]], dim=1)
    assert matched_correlation(copies, a[:, :1]) == pytest.approx(0.5)  # one latent serves one feature only
    assert matched_correlation(a, a[:, [2, 0, 3, 1]]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(n_features=3, d=4, n_active=4), "n_active=4 of n_features=3"),
        (dict(n_features=3, d=4, n_active=1, children=1.0), "children=1.0"),
        (dict(n_features=3, d=4, n_active=1, skew=-1.0), "skew=-1.0"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(InterpError, match=message):
        planted(**arguments)
    with pytest.raises(InterpError, match="features of width 5 against 4"):
        recovery(planted(3, 4, n_active=1), SparseDictionary.random(5, 6, TopK(1), seed=0))


@pytest.mark.slow
def test_1024_features_in_128_dimensions():
    """The generator at its default size trains: a top-k autoencoder gets far above chance in a short budget."""
    from interp.dictionaries.train import TrainConfig, train_sae

    truth = planted(seed=0)
    batches = truth.batches(1024, seed=1)
    cfg = TrainConfig(d_dict=1024, k=5, n_steps=600, batch_size=1024, lr=3e-3, dead_after_tokens=50_000)
    trained = train_sae(batches, next(batches), cfg)
    found = recovery(truth, trained.sae, n_tokens=4096)
    assert found.mmcs > found.mmcs_chance + 0.25
    assert found.mcc > found.mcc_chance + 0.25
