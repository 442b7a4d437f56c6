"""Cosine structure and agreement of seeds on arrangements whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from interp.core.errors import InterpError
from interp.dictionaries.activations.topk import TopK
from interp.dictionaries.baselines import IdentityDictionary
from interp.dictionaries.dictionary import SparseDictionary
from interp.dictionaries.judge.geometry import geometry, nearest_rows
from interp.dictionaries.judge.stability import agreement


def random_rows(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_nearest_rows_equal_a_loop_for_any_block():
    a, b = random_rows(23, 6), random_rows(9, 6, 1)
    for block in (1, 5, 23, 100):
        best, which = nearest_rows(a, b, block=block)
        among, neighbour = nearest_rows(a, block=block)
        for i in range(23):
            to_b = [float(torch.cosine_similarity(a[i], row, dim=0)) for row in b]
            to_a = [float(torch.cosine_similarity(a[i], row, dim=0)) if j != i else -9 for j, row in enumerate(a)]
            assert float(best[i]) == pytest.approx(max(to_b), abs=1e-6) and int(which[i]) == to_b.index(max(to_b))
            assert float(among[i]) == pytest.approx(max(to_a), abs=1e-6) and int(neighbour[i]) == to_a.index(max(to_a))


def test_orthogonal_rows_copies_and_alignment():
    sae = SparseDictionary(8, 8, TopK(2))
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(8))
        sae.W_enc.copy_(torch.eye(8))
    found = geometry(sae).summary()
    assert found == {
        "decoder_max_cosine": 0.0, "encoder_max_cosine": 0.0, "encoder_decoder": 1.0, "near_copies": 0.0,
    }  # fmt: skip
    with torch.no_grad():
        sae.W_dec[1] = 3 * sae.W_dec[0] + 0.1 * sae.W_dec[2]  # nearly a copy
        sae.W_enc[:, 7] = torch.eye(8)[6]  # reads what latent 6 reads
    copied = geometry(sae, block=3)
    assert copied.summary()["near_copies"] == pytest.approx(2 / 8)
    assert int(copied.neighbour[0]) == 1 and int(copied.neighbour[1]) == 0
    assert copied.encoder is not None and copied.aligned is not None
    assert float(copied.encoder[6]) == pytest.approx(1.0) and float(copied.aligned[7]) == pytest.approx(0.0)
    assert float(copied.aligned[1]) == pytest.approx(0.0, abs=1e-6)


def test_chance_is_what_random_dictionaries_have():
    sae = SparseDictionary.random(32, 400, TopK(4), seed=3)
    found = geometry(sae)
    assert found.summary()["decoder_max_cosine"] == pytest.approx(found.chance, abs=0.01)
    other = random_rows(4000, 32, 1), random_rows(4000, 32, 2)
    drawn = torch.cosine_similarity(*other, dim=1).abs().mean()
    assert found.aligned_chance == pytest.approx(float(drawn), rel=0.05)
    assert geometry(IdentityDictionary(5)).encoder is None


def test_a_rotated_order_is_the_same_dictionary_and_a_random_one_is_chance():
    a = random_rows(60, 16)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    same = agreement(a, 5 * a[order])
    assert same.stability == pytest.approx(1.0) and same.shared == 1.0 and not same.upper_bound
    strangers = agreement(a, random_rows(60, 16, 9))
    assert strangers.stability == pytest.approx(strangers.stability_chance, abs=0.03)
    half = torch.cat([a[:30], random_rows(30, 16, 4)])
    partly = agreement(a, half)
    assert partly.shared == pytest.approx(0.5, abs=0.1)
    assert agreement(half, a).stability == pytest.approx(partly.stability, abs=1e-5)


def test_one_to_one_matching_against_all_permutations():
    import itertools

    a, b = random_rows(5, 3), random_rows(5, 3, 1)
    cosines = torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T
    best = max(sum(float(cosines[i, j]) for i, j in enumerate(order)) for order in itertools.permutations(range(5)))
    assert agreement(a, b).stability == pytest.approx(best / 5, abs=1e-6)


def test_a_subset_is_named_an_upper_bound():
    a, b = random_rows(40, 8), random_rows(40, 8, 1)
    cut = agreement(a, b, max_rows=10)
    assert cut.upper_bound and cut.cosines.shape == (10,)
    assert cut.stability > agreement(a, b).stability


def test_a_large_dictionary_needs_no_full_matrix():
    rows = random_rows(6000, 8)
    assert nearest_rows(rows, block=500)[0].shape == (6000,)
    assert math.isfinite(float(nearest_rows(rows, block=500)[0].mean()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nearest_rows(torch.ones(1, 3)), "1 rows leave nothing"),
        (lambda: nearest_rows(torch.ones(4, 3), block=0), "block=0"),
        (lambda: agreement(torch.ones(4, 3), torch.ones(4, 2)), "widths 3 and 2"),
        (lambda: agreement(torch.ones(4, 3), torch.ones(0, 3)), "nothing to match"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InterpError, match=message):
        call()
