"""A planted case with a linear readout: separate latents can be swapped one by one, mixed ones cannot."""

from __future__ import annotations

import pytest
import torch

from interp.core.errors import InterpError
from interp.dictionaries.activations.topk import TopK
from interp.dictionaries.dictionary import SparseDictionary
from interp.dictionaries.judge.ravel import Pairs, disentangle, random_masks, score_mask, swapped

VALUES = 3


def pairs(n: int, seed: int) -> Pairs:
    """Coordinates 0-2 say the city's country, 3-5 its language, 6-7 nothing."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        values = {name: torch.randint(VALUES, (n,), generator=generator) for name in ("country", "language")}
        x = 0.1 * torch.rand(n, 8, generator=generator)
        x[torch.arange(n), values["country"]] += 1.0
        x[torch.arange(n), 3 + values["language"]] += 1.0
        return x, values

    (base, base_values), (source, source_values) = draw(), draw()
    return Pairs(base=base, source=source, base_values=base_values, source_values=source_values)


def readout(x: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"country": 5 * x[:, :3], "language": 5 * x[:, 3:6]}


def with_features(features: torch.Tensor) -> SparseDictionary:
    """Codes are read by the inverse, so that reconstruction is exact where codes are positive."""
    sae = SparseDictionary(8, len(features), TopK(len(features)))
    with torch.no_grad():
        sae.W_dec.copy_(features)
        sae.W_enc.copy_(torch.linalg.pinv(features))
    return sae


def test_separate_latents_are_swapped_alone():
    sae = with_features(torch.eye(8))
    found = disentangle(readout, sae, pairs(300, 0), pairs(200, 1), "country", n_steps=120)
    assert found.cause == 1.0 and found.isolation == 1.0 and found.score == 1.0
    assert found.mask[:3].tolist() == [True] * 3 and not bool(found.mask[3:6].any())
    null = random_masks(readout, sae, pairs(200, 1), "country", found, n=10)
    assert sum(one.score for one in null) / 10 < 0.7


def test_a_latent_that_holds_both_cannot_isolate():
    mixed = torch.eye(8)
    mixed[:3, 3:6] = torch.eye(3)  # latents 0-2 write language as well
    mixed[3:6, :3] = -torch.eye(3)
    sae = with_features(mixed / mixed.norm(dim=1, keepdim=True))
    found = disentangle(readout, sae, pairs(300, 0), pairs(200, 1), "country", n_steps=120)
    assert found.score < 0.9


def test_nothing_and_everything_score_a_half():
    sae, test = with_features(torch.eye(8)), pairs(200, 1)
    nothing = score_mask(readout, sae, test, "country", torch.zeros(8, dtype=torch.bool))
    everything = score_mask(readout, sae, test, "country", torch.ones(8, dtype=torch.bool))
    same = float((test.base_values["language"] == test.source_values["language"]).double().mean())
    assert (nothing.cause, nothing.isolation) == (0.0, 1.0)
    assert everything.cause == 1.0 and everything.isolation == pytest.approx(same)


def test_the_error_of_reconstruction_stays():
    sae, test = with_features(torch.eye(8)[:3]), pairs(50, 1)
    mask = torch.zeros(3, dtype=torch.bool)
    torch.testing.assert_close(swapped(sae, test, mask), test.base)
    mask[:] = True
    new = swapped(sae, test, mask)
    torch.testing.assert_close(new[:, 3:], test.base[:, 3:])
    torch.testing.assert_close(new[:, :3], test.source[:, :3])


def test_bad_input_is_named():
    train = pairs(20, 0)
    sae = with_features(torch.eye(8))
    with pytest.raises(InterpError, match="unknown attribute 'river'"):
        disentangle(readout, sae, train, train, "river")
    same = Pairs(
        base=train.base, source=train.base, base_values=train.base_values, source_values=train.base_values
    )  # fmt: skip
    with pytest.raises(InterpError, match="no pair differs"):
        score_mask(readout, sae, same, "country", torch.ones(8, dtype=torch.bool))
    with pytest.raises(InterpError, match="two or more attributes"):
        Pairs(base=train.base, source=train.base, base_values={}, source_values={})
