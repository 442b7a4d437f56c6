"""Planted absorption: exactly the tokens where the special latent takes over are counted."""

from __future__ import annotations

import pytest
import torch

from interp.dictionaries.activations.topk import TopK
from interp.dictionaries.dictionary import SparseDictionary
from interp.dictionaries.judge.absorption import absorption, absorption_of, main_latents

D = 8
"""Coordinate 0 is the concept; 1 is one special token's; 2.. are noise."""


def planted_dictionary(*, absorbs: bool) -> SparseDictionary:
    """Latent 0 reads the concept; latent 1 reads the special token and, if it absorbs, carries the concept too."""
    sae = SparseDictionary(D, D, TopK(D))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(D))
        sae.W_dec.copy_(torch.eye(D))
        if absorbs:
            sae.W_dec[1, 0] = 1.0  # the special token's latent writes the concept as well
            sae.W_enc[1, 0] = -2.0  # and silences the concept's own latent
    return sae


def tokens(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Activations, whether each has the concept, and which of those are the special token (one in 20)."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.05 * torch.rand(n, D, generator=generator)
    y = torch.arange(n) % 2 == 0
    special = torch.arange(n) % 40 == 0
    x[:, 0] += 1.0 * y
    x[:, 1] += 1.0 * special
    return x, y, special


def test_exactly_the_planted_tokens_are_absorbed():
    train, test = tokens(400, 0), tokens(400, 1)
    found = absorption(planted_dictionary(absorbs=True), train[:2], test[:2])
    assert found.main.tolist() == [0] and found.f1 > 0.9 and found.probe_accuracy == 1.0
    assert torch.equal(found.tokens, test[1].nonzero()[:, 0])
    special = test[2][found.tokens]
    assert torch.equal(found.full, special)
    assert set(found.absorber[special].tolist()) == {1} and set(found.absorber[~special].tolist()) == {0}
    torch.testing.assert_close(found.fraction, special.double())


def test_without_absorption_nothing_is_counted():
    train, test = tokens(400, 0), tokens(400, 1)
    found = absorption(planted_dictionary(absorbs=False), train[:2], test[:2])
    assert not bool(found.full.any()) and float(found.fraction.max()) == 0.0


def test_a_half_silent_main_latent_is_a_fraction_and_not_full():
    features = torch.eye(4)
    features[1, 0] = 1.0  # cosine .707 to the probe
    direction = torch.tensor([2.0, 0.0, 0.0, 0.0])
    codes = torch.tensor([
        [1.0, 0.0, 0.0, 0.0],  # main alone
        [0.4, 0.6, 0.0, 0.0],  # shared: .6 / (.6 + .4)
        [0.0, 1.0, 0.0, 0.0],  # absorbed
        [0.0, 0.3, 0.0, 0.0],  # the other holds too little
        [0.8, 0.7, 0.0, 0.0],  # more than the projection: only what is missing counts
        [0.0, 0.0, 1.0, 0.0],  # an orthogonal latent holds nothing
    ])  # fmt: skip
    projection = torch.ones(6, dtype=torch.float64)
    full, fraction, best = absorption_of(projection, codes, features, direction, torch.tensor([0]))
    assert full.tolist() == [False, False, True, False, False, False]
    assert fraction.tolist() == pytest.approx([0.0, 0.6, 1.0, 0.0, 0.2, 0.0])
    assert best[:5].tolist() == [0, 1, 1, 1, 0]
    negative = absorption_of(-projection, codes, features, direction, torch.tensor([0]))
    assert not bool(negative[0].any()) and float(negative[1].max()) == 0.0
    longer = absorption_of(projection, codes / 3, 3 * features, direction, torch.tensor([0]))
    torch.testing.assert_close(longer[1], fraction)  # rows need not be of norm 1


def test_main_latents_are_as_many_as_raise_f1():
    y = torch.arange(120) % 2 == 0
    codes = torch.zeros(120, 6)
    codes[::4, 0] = 1.0  # half of the concept
    codes[2::4, 3] = 1.0  # the other half: the concept is split
    codes[:, 5] = torch.rand(120, generator=torch.Generator().manual_seed(0))
    main, f1 = main_latents(codes, y)
    assert sorted(main.tolist()) == [0, 3] and f1 == 1.0
    assert main_latents(torch.zeros(120, 6), y)[0].tolist() == []


def test_a_concept_that_the_probe_does_not_find_is_refused():
    from interp.core.errors import InterpError

    x, y, _ = tokens(40, 0)
    with pytest.raises(InterpError, match="at no test token"):
        absorption(planted_dictionary(absorbs=False), (x, y), (x[~y], y[~y]))
