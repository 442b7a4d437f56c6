"""Directions: planted ones are recovered, controls are what they say, reliability has known values."""

import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

from interp.core.errors import InterpError
from interp.instrument.capture import capture
from interp.instrument.tokens import tokenize
from interp.models.tiny import tiny_model
from interp.steering.directions import (
    direction,
    random_directions,
    random_signs,
    read_last,
    reliability,
    shuffled_directions,
    split_half_cosines,
)


def planted(size: float, n: int = 200, d: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = normalize(torch.randn(d, generator=generator), dim=0)
    return size * target + torch.randn(n, d, generator=generator), target


@pytest.mark.parametrize("method", ["mean", "pca"])
@pytest.mark.parametrize(("size", "least"), [(1.0, 0.75), (2.0, 0.95), (5.0, 0.99)])
def test_a_planted_direction_is_recovered_with_its_sign(method: str, size: float, least: float) -> None:
    differences, target = planted(size)
    for sign in (1, -1):
        found = direction(sign * differences, method)
        assert cosine_similarity(found, sign * target, dim=0) > least
        torch.testing.assert_close(found.norm(), differences.mean(0).norm())


def test_centred_pca_would_have_lost_it() -> None:
    differences, target = planted(5.0)
    centred = torch.linalg.svd(differences - differences.mean(0), full_matrices=False).Vh[0]
    assert abs(cosine_similarity(centred, target, dim=0)) < 0.3
    assert cosine_similarity(direction(differences, "pca"), target, dim=0) > 0.99


def test_pairs_without_a_difference_or_an_unknown_method_are_refused() -> None:
    with pytest.raises(InterpError, match="mean difference is zero"):
        direction(torch.zeros(4, 3))
    with pytest.raises(InterpError, match="unknown method"):
        direction(torch.ones(4, 3), "median")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_activations_are_read_at_each_texts_last_token(family: str) -> None:
    model = tiny_model(family)
    texts = ["one", "another text", "x y"] * 20
    found = read_last(model, texts, [0, 2])
    for index, layer in enumerate([0, 2]):
        with capture(model, f"resid_post.{layer}") as acts:
            model(tokenize(model, texts[1]))
        torch.testing.assert_close(found[index, 1], acts[f"resid_post.{layer}"][0, -1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[index, 1], found[index, 58 - 58 % 3 + 1], rtol=1e-4, atol=1e-4)


def test_reliability_of_identical_pairs_is_perfect_and_of_noise_is_not() -> None:
    generator = torch.Generator().manual_seed(1)
    negative = torch.randn(30, 8, generator=generator)
    shift = torch.arange(8.0)
    sure = reliability(negative + shift, negative)
    for value in (sure.split_half, sure.agreement, sure.pca_share, sure.cosine_to_pca):
        assert abs(value - 1) < 1e-4
    along = negative @ normalize(shift, dim=0)
    assert abs(sure.separation - float(shift.norm() / along.std())) < 1e-3
    noise = reliability(torch.randn(30, 8, generator=generator), negative)
    assert noise.split_half < 0.5 and noise.separation < 2


def test_halves_need_enough_pairs() -> None:
    with pytest.raises(InterpError, match="at least 4"):
        split_half_cosines(torch.ones(3, 2))


def test_random_directions_are_unit_isotropic_and_seeded() -> None:
    found = random_directions(500, 16, seed=0)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(500))
    assert found.mean(0).norm() < 0.15
    assert torch.equal(found, random_directions(500, 16, seed=0))
    assert not torch.equal(found, random_directions(500, 16, seed=1))


@pytest.mark.parametrize("n_pairs", [6, 7])
def test_shuffled_labels_favour_no_side(n_pairs: int) -> None:
    signs = random_signs(50, n_pairs, seed=0)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert (signs.sum(1).abs() <= n_pairs % 2).all()
    differences, target = planted(5.0, n=40)
    real = direction(differences) @ target / direction(differences).norm()
    shuffled = shuffled_directions(differences, 20, seed=0) @ target
    assert real > 0.95 and shuffled.abs().max() < 0.9 and shuffled.abs().mean() < 0.5
