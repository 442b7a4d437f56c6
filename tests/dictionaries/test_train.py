"""The trainer: planted directions are found, schedules are pure, runs repeat bit for bit, failures are named."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from interp.core.errors import InterpError
from interp.core.progress import listening
from interp.dictionaries import losses
from interp.dictionaries.activations.topk import TopK
from interp.dictionaries.activity import observe
from interp.dictionaries.dictionary import SparseDictionary
from interp.dictionaries.metrics import evaluate, mean_max_cosine
from interp.dictionaries.start import geometric_median
from interp.dictionaries.train import (
    Stepper,
    TrainConfig,
    initial,
    normalise_decoder,
    project_decoder_grad,
    train_sae,
)
from interp.dictionaries.train_config import k_at, learning_rate


def planted(d: int, n_truth: int, n_active: int, batch: int, seed: int):
    """Endless batches of sums of `n_active` of `n_truth` random unit directions with values in [.5, 1.5]."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.nn.functional.normalize(torch.randn(n_truth, d, generator=generator), dim=1)

    def batches():
        while True:
            active = torch.rand(batch, n_truth, generator=generator).topk(n_active, dim=1).indices
            values = torch.rand(batch, n_active, generator=generator) + 0.5
            yield torch.zeros(batch, n_truth).scatter_(1, active, values) @ truth

    return truth, batches()


def test_planted_directions_are_found():
    """Smaller than the method card's case (64 dimensions, 256 truths, 2500 steps: mean max cosine .998)."""
    truth, batches = planted(24, 48, 3, 512, seed=0)
    sample = next(batches)
    cfg = TrainConfig(d_dict=48, k=3, n_steps=700, batch_size=512, lr=3e-3, dead_after_tokens=20_000)
    trained = train_sae(batches, sample, cfg)
    held_out = list(itertools.islice(batches, 4))
    chance = mean_max_cosine(truth, SparseDictionary.random(24, 48, TopK(3), seed=99).features)
    found = mean_max_cosine(truth, trained.sae.features)
    scored = evaluate(trained.sae, held_out)
    assert chance < 0.6
    assert found > 0.93, f"mean max cosine {found:.3f}, by chance {chance:.3f}"
    assert scored.fvu < 0.2 and 1.0 < scored.l0 <= 3.0
    assert trained.curve["fvu"].iloc[-1] < 0.5 * trained.curve["fvu"].iloc[0]
    assert abs(scored.fvu - trained.curve["fvu"].iloc[-1]) < 0.05


def test_two_runs_are_bitwise_equal_and_another_seed_is_not():
    def run(seed: int) -> SparseDictionary:
        _, batches = planted(8, 16, 2, 64, seed=3)
        return train_sae(batches, next(batches), TrainConfig(d_dict=16, k=2, n_steps=20, batch_size=64, seed=seed)).sae

    first, again, other = run(0), run(0), run(1)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert not torch.equal(first.W_dec, other.W_dec)


def test_dead_latents_come_back_through_the_auxiliary_loss():
    """Half of the latents start too far below zero ever to be selected: only AuxK can reach them."""

    def firing(weight: float) -> tuple[int, list[float]]:
        _, batches = planted(24, 48, 3, 256, seed=1)
        cfg = TrainConfig(
            d_dict=48, k=3, n_steps=300, batch_size=256, lr=3e-3, dead_after_tokens=1_000, aux_weight=weight
        )
        sae = initial(next(batches), cfg)
        with torch.no_grad():
            sae.b_enc[:24] -= 0.8 * math.sqrt(24)
        steps = Stepper(sae, cfg)
        rows = [steps.step(number, next(batches)) for number in range(cfg.n_steps)]
        codes = steps.sae.encode(torch.cat(list(itertools.islice(batches, 4))))
        return int((codes.firings()[:24] > 0).sum()), [row["dead_fraction"] for row in rows]

    (without, never), (revived, over_time) = firing(0.0), firing(1.0)
    assert never[3] == 0.0 and never[4] >= 0.5  # 1000 tokens are reached with the fourth batch of 256
    assert revived > without + 8, (without, revived)
    assert over_time[-1] < over_time[4]


def test_rows_are_unit_during_training_and_the_scale_is_folded_once():
    _, batches = planted(8, 16, 2, 64, seed=3)
    sample = 50 * next(batches)
    trained = train_sae((50 * x for x in batches), sample, TrainConfig(d_dict=16, k=2, n_steps=15, batch_size=64))
    assert trained.scale == pytest.approx(math.sqrt(8) / float(sample.norm(dim=1).mean()))
    assert float(trained.sae.scale_in) == 1.0
    torch.testing.assert_close(trained.sae.features.norm(dim=1) * trained.scale, torch.ones(16))
    assert not any(p.requires_grad for p in trained.sae.parameters())


def test_scaling_the_data_scales_the_dictionary():
    def run(factor: float) -> SparseDictionary:
        _, batches = planted(8, 16, 2, 64, seed=3)
        first = next(batches)
        return train_sae(
            (factor * x for x in batches), factor * first, TrainConfig(d_dict=16, k=2, n_steps=10, batch_size=64)
        ).sae

    _, batches = planted(8, 16, 2, 64, seed=3)
    x = next(batches)
    torch.testing.assert_close(run(4.0)(4 * x), 4 * run(1.0)(x), rtol=1e-3, atol=1e-3)


def test_projection_removes_the_radial_gradient_and_nothing_else():
    sae = SparseDictionary.random(6, 9, TopK(2), seed=0)
    gradient = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    sae.W_dec.grad = gradient.clone()
    project_decoder_grad(sae)
    assert (sae.W_dec.grad * sae.W_dec).sum(1).abs().max() < 1e-6
    along = (gradient * sae.W_dec).sum(1, keepdim=True) * sae.W_dec
    torch.testing.assert_close(sae.W_dec.grad, (gradient - along).detach())
    with torch.no_grad():
        sae.W_dec.mul_(3.0)
    normalise_decoder(sae)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(9))


def test_learning_rate_is_a_function_of_the_step():
    cfg = TrainConfig(d_dict=2304, n_steps=100, warmup_fraction=0.1, decay_fraction=0.2)
    peak = 2e-4 / math.sqrt(2304 / 16384)
    rates = [learning_rate(step, cfg) for step in range(100)]
    assert rates[0] == pytest.approx(peak / 10) and rates[9] == rates[50] == pytest.approx(peak)
    assert (
        rates[80] == pytest.approx(peak)
        and rates[90] == pytest.approx(peak / 2)
        and rates[99] == pytest.approx(peak / 20)
    )
    assert min(rates) > 0
    assert learning_rate(50, TrainConfig(lr=0.7)) == 0.7


def test_geometric_median_resists_an_outlier_and_survives_meeting_a_sample():
    x = torch.cat([torch.randn(99, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([[1e4, 0.0, 0.0]])])
    assert geometric_median(x).norm() < 0.5 < x.mean(0).norm()
    symmetric = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert geometric_median(symmetric).abs().max() < 1e-4


def test_progress_is_reported():
    _, batches = planted(8, 16, 2, 64, seed=3)
    seen: list[tuple[int, int]] = []
    with listening(lambda _, done, total: seen.append((done, total))):
        train_sae(batches, next(batches), TrainConfig(d_dict=16, k=2, n_steps=5, batch_size=64))
    assert seen == [(done, 5) for done in range(6)]


def test_nan_stops_with_the_step():
    _, batches = planted(8, 16, 2, 64, seed=3)
    sample = next(batches)
    poisoned = (x if i != 3 else x * float("nan") for i, x in enumerate(batches))
    with pytest.raises(InterpError, match="nan at step 3"):
        train_sae(poisoned, sample, TrainConfig(d_dict=16, k=2, n_steps=10, batch_size=64))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TrainConfig(k=64, d_dict=48), "k=64 must lie in 1..d_dict=48"),
        (lambda: TrainConfig(n_steps=0), "n_steps"),
        (lambda: TrainConfig(warmup_fraction=0.7, decay_fraction=0.7), "sum to at most 1"),
        (lambda: initial(torch.zeros(0, 4), TrainConfig()), "no activations to train on"),
        (lambda: initial(torch.zeros(3, 4), TrainConfig()), "all zero"),
        (lambda: initial(torch.full((3, 4), float("inf")), TrainConfig()), "NaN or infinity"),
        (lambda: train_sae(iter([]), torch.ones(3, 4), TrainConfig(d_dict=8, k=2)), "ran out at step 0 of 400"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InterpError, match=message):
        call()


@pytest.mark.slow
def test_the_planted_case_of_the_method_card():
    """d = 64, 256 truths, 5 active, m = 256, k = 5, 2500 steps of 512: the card has MMCS .998 and FVU .107."""
    truth, batches = planted(64, 256, 5, 512, seed=0)
    cfg = TrainConfig(d_dict=256, k=5, n_steps=2500, batch_size=512, lr=3e-3, dead_after_tokens=100_000)
    trained = train_sae(batches, next(batches), cfg)
    chance = mean_max_cosine(truth, SparseDictionary.random(64, 256, TopK(5), seed=99).features)
    found = mean_max_cosine(truth, trained.sae.features)
    assert chance == pytest.approx(0.346, abs=0.01)
    assert found > 0.97, f"mean max cosine {found:.3f}, by chance {chance:.3f}"
    assert evaluate(trained.sae, list(itertools.islice(batches, 8))).fvu < 0.14


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "matryoshka", "shells": (0.5, 0.2)}, "sum to 1"),
        ({"kind": "matryoshka", "shells": ()}, "sum to 1"),
        ({"kind": "group_max", "d_dict": 130, "k": 8}, "equal groups"),
        ({"kind": "group_max", "d_dict": 128, "k": 8, "k_start": 16}, "without k_start"),
        ({"kind": "jump_relu", "bandwidth": 0.0}, "bandwidth=0.0"),
        ({"kind": "jump_relu", "threshold": -0.1}, "threshold=-0.1"),
    ],
)
def test_settings_that_would_fail_in_training_are_refused_before_it(options, message):
    with pytest.raises(InterpError, match=message):
        TrainConfig(**options)


def test_k_falls_linearly_from_its_start_and_then_stays():
    cfg = TrainConfig(d_dict=64, k=4, k_start=24, k_fraction=0.5, n_steps=20)
    found = [k_at(step, cfg) for step in range(cfg.n_steps)]
    assert found == [24, 22, 20, 18, 16, 14, 12, 10, 8, 6, *[4] * 10]
    assert {k_at(step, replace(cfg, k_start=0)) for step in range(cfg.n_steps)} == {4}


def test_a_step_is_adam_on_gradients_without_their_part_along_the_rows():
    """The first step of Adam is the sign of the gradient: where the part along the row was, decides what it is."""
    cfg = TrainConfig(d_dict=12, k=3, n_steps=10, batch_size=64, lr=0.05, warmup_fraction=0.0)
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    steps = Stepper(initial(x, cfg), cfg)
    before = steps.sae.like()
    losses.fvu(observe(before, x)).backward()
    rows, grad = before.W_dec.detach(), before.W_dec.grad
    assert grad is not None
    across = grad - (grad * rows).sum(1, keepdim=True) * rows
    assert bool((across.sign() != grad.sign()).any()), "nothing would tell the two apart"
    moved = rows - 0.05 * across / (across.abs() + 1e-8)
    steps.step(0, x)
    torch.testing.assert_close(steps.sae.W_dec.detach(), moved / moved.norm(dim=1, keepdim=True))
