"""Patching: the wave against one forward per site, closed forms, gradients, controls, refusals, real numbers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from interp.analyses import patching_wave
from interp.analyses.patching import SPEC, PatchingConfig, example, load, run
from interp.analyses.patching_bench import all_sites, compare_naive, in_a_wave, one_by_one
from interp.analyses.patching_controls import _answers, _other_prompts, best
from interp.analyses.patching_gradient import estimates
from interp.analyses.patching_scores import OTHER, Direction, Scores, endpoints, intervals, measure, unrelated
from interp.analyses.patching_wave import KINDS
from interp.core.errors import InterpError
from interp.instrument.capture import capture
from interp.instrument.edits import edited, patch_from
from interp.models.load import load as load_model
from interp.models.tiny import tiny_model
from interp.tasks.ioi import random_pairs

FAMILIES = ["llama", "gemma3", "gpt2"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("direction", list(Direction))
@pytest.mark.parametrize("few", [1, 20, 256])
def test_the_wave_equals_one_forward_per_patch(
    family: str, direction: Direction, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: every patch on its own, through the public edits, on the whole prompt. `few`: how positions are split."""
    monkeypatch.setattr(patching_wave, "FEW", few)
    model = tiny_model(family)
    pairs = random_pairs(model, n=2, length=6)
    ends = endpoints(model, pairs)
    found = measure(model, pairs, ends, KINDS, direction)
    denoise = direction is Direction.DENOISE
    first, second = (pairs.corrupt, pairs.clean) if denoise else (pairs.clean, pairs.corrupt)
    base, donor = (ends.corrupt, ends.clean) if denoise else (ends.clean, ends.corrupt)
    gap = float((donor.logit_diff - base.logit_diff).mean())
    with capture(model, [f"{kind}.*" for kind in KINDS]) as acts:
        model(second.ids)
    for kind in KINDS:
        for layer in range(model.n_layers):
            site = f"{kind}.{layer}"
            for index in range(found[kind]["logit_diff"].shape[2]):
                where = {"head": index} if kind == "z" else {"at": index}
                with edited(model, patch_from(site, acts[site], **where)):
                    now = Scores.of(model(first.ids)[:, -1], pairs.answers, ends.other)
                expected = (now.logit_diff - base.logit_diff) / gap
                np.testing.assert_allclose(
                    found[kind]["logit_diff"][:, layer, index], expected.numpy(), atol=2e-3 / abs(gap)
                )


def test_the_last_layer_of_the_stream_is_the_donor_at_the_end_and_nothing_elsewhere() -> None:
    model = tiny_model("llama")
    pairs = random_pairs(model, n=2, length=6)
    found = measure(model, pairs, endpoints(model, pairs), ("resid_post",), Direction.DENOISE)["resid_post"]
    last = {metric: values[:, -1].mean(0) for metric, values in found.items()}
    for metric in ("logit_diff", "prob", "kl"):
        np.testing.assert_allclose(last[metric], [0, 0, 0, 0, 0, 1], atol=1e-4)


def test_positions_before_the_change_are_exactly_zero() -> None:
    model = tiny_model("llama")
    pairs = random_pairs(model, n=2, length=6)
    found = measure(model, pairs, endpoints(model, pairs), ("resid_post", "mlp_out"), Direction.NOISE)
    for kind in found:
        assert not found[kind]["logit_diff"][:, :, : pairs.first_difference].any()


def test_gradients_predict_small_patches() -> None:
    """Causal oracle: the predicted change of a tiny edit is the measured one."""
    model = tiny_model("llama", dtype=torch.float64)
    pairs = random_pairs(model, n=1, length=5)
    ids = pairs.corrupt.ids
    with capture(model, "embed") as base:
        model(ids)
    nudge = 1e-4 * torch.randn(base["embed"].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with capture(model, "embed", grad=True) as acts:
        logits = model(ids)[:, -1]
        (logits[0, pairs.answers[0, 0]] - logits[0, pairs.answers[0, 1]]).backward()
    predicted = float((nudge * acts.grad("embed")).sum())
    logits = logits.detach()
    with edited(model, patch_from("embed", base["embed"] + nudge)):
        moved = model(ids)[:, -1]
    actual = float(
        (moved[0, pairs.answers[0, 0]] - moved[0, pairs.answers[0, 1]])
        - (logits[0, pairs.answers[0, 0]] - logits[0, pairs.answers[0, 1]])
    )
    assert predicted == pytest.approx(actual, rel=1e-2)  # transformers' norms compute in float32


@pytest.mark.parametrize("n_steps", [0, 3])
def test_estimates_equal_gradients_taken_by_hand(n_steps: int) -> None:
    """Oracle: autograd on `inputs_embeds`, with the stream's gradient read off transformers' hidden states."""
    model = tiny_model("llama", dtype=torch.float64)
    pairs = random_pairs(model, n=2, length=5)
    found = estimates(model, pairs.corrupt, pairs.clean, pairs.answers, ("resid_post",), n_steps)
    table = model.weight("W_E").detach()
    base, donor = table[pairs.corrupt.ids], table[pairs.clean.ids]
    with torch.no_grad():
        ends = [
            model.module(x, output_hidden_states=True).hidden_states[1] for x in (pairs.corrupt.ids, pairs.clean.ids)
        ]
    total = torch.zeros_like(base)
    points = [(k + 0.5) / n_steps for k in range(n_steps)] or [0.0]
    for point in points:
        mixed = torch.lerp(base, donor, point).requires_grad_()
        out = model.module(inputs_embeds=mixed, use_cache=False, output_hidden_states=True)
        chosen = out.logits[:, -1].gather(1, pairs.answers)
        (grad,) = torch.autograd.grad((chosen[:, 0] - chosen[:, 1]).sum(), out.hidden_states[1])
        total += grad / len(points)
    expected = ((ends[1] - ends[0]) * total).sum(-1)
    torch.testing.assert_close(found[model.table.one("resid_post.0")], expected)


def test_estimates_leave_the_gradients_of_the_weights_alone() -> None:
    model = tiny_model("gpt2")
    pairs = random_pairs(model, n=2, length=5)
    weight = next(iter(model.module.parameters()))
    weight.grad = torch.ones_like(weight)
    estimates(model, pairs.corrupt, pairs.clean, pairs.answers, KINDS, 2)
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert all(p.grad is None for p in model.module.parameters() if p is not weight)


def test_shares_are_what_full_restoration_looks_like() -> None:
    """The donor's own values, put through the formula of an effect, give each pair its share and their mean is 1."""
    model = tiny_model("llama")
    pairs = random_pairs(model, n=3, length=6)
    ends = endpoints(model, pairs)
    for direction in Direction:
        last = measure(model, pairs, ends, ("resid_post",), direction)["resid_post"]
        for metric in ("logit_diff", "prob", "kl"):
            shares = ends.shares(direction, metric)
            assert shares.mean() == pytest.approx(1)
            np.testing.assert_allclose(last[metric][:, -1, -1], shares, atol=1e-3)


def test_intervals_follow_the_ratio_of_means() -> None:
    shares = np.array([0.2, 0.6, 1.2, 2.0])
    exact = np.array([[0.5, -1.0], [0.0, 2.0]])
    low, high = intervals(shares[:, None, None] * exact, shares)
    np.testing.assert_allclose(low, exact)  # the same fraction of every pair's gap: nothing to be unsure of
    np.testing.assert_allclose(high, exact)
    noisy = np.random.default_rng(0).normal(0.3, 0.5, size=(400, 1, 1))
    low, high = intervals(noisy, np.ones(400))
    half = 1.96 * noisy.std() / np.sqrt(400)
    assert low[0, 0] == pytest.approx(noisy.mean() - half, abs=0.2 * half)
    assert high[0, 0] == pytest.approx(noisy.mean() + half, abs=0.2 * half)
    assert np.isnan(intervals(noisy[:1], np.ones(1))).all()


def effects_of(values: np.ndarray, other: np.ndarray | float = 0.0) -> dict[str, dict[str, np.ndarray]]:
    return {"z": {"logit_diff": values, OTHER: np.zeros_like(values) + other}}


def test_best_sites_are_the_largest_of_either_sign_and_ties_keep_the_order_of_the_model() -> None:
    values = np.zeros((2, 3, 2))
    values[:, 2, 0], values[:, 0, 1], values[:, 1, 1] = -0.9, 0.5 + 1e-7, 0.5
    assert best(effects_of(values), 3) == [("z", 2, 0), ("z", 0, 1), ("z", 1, 1)]
    stream = {"resid_post": {"logit_diff": values + 5}}
    assert best(effects_of(values) | stream, 1)[0][0] == "z"
    assert best(stream, 1)[0][0] == "resid_post"


def test_sites_that_only_fit_the_prompts_they_were_chosen_on_do_not_pass() -> None:
    rng = np.random.default_rng(0)
    planted = 0.01 * rng.normal(size=(8, 10, 9))
    planted[:, 3, :5] += 0.4
    held = _other_prompts(effects_of(planted), seed=0)
    assert held.passed and held.observed == pytest.approx(0.4, abs=0.02)
    p = [_other_prompts(effects_of(rng.normal(size=(8, 10, 9))), seed=s).p_value for s in range(200)]
    assert np.mean(np.array(p) < 0.05) < 0.11  # 5 % expected; 0.11 is four standard errors above


def test_answers_of_others_that_move_as_much_do_not_pass() -> None:
    values = np.zeros((2, 3, 2))
    values[:, 1, 1] = 0.8
    assert _answers(effects_of(values, 0.1)).passed
    assert not _answers(effects_of(values, 0.8)).passed


def test_unrelated_pairs_share_no_answer() -> None:
    pairs = random_pairs(tiny_model("llama"), n=3)
    answers = torch.tensor([[1, 2], [2, 1], [3, 4]])
    assert unrelated(replace(pairs, answers=answers)).tolist() == [2, 2, 0]
    assert unrelated(replace(pairs, answers=answers[[0, 0, 1]])).tolist() == [0, 1, 2]


def test_refusals() -> None:
    model = tiny_model("llama")
    data, cfg = example(model)
    with pytest.raises(InterpError, match="clean prompts right"):
        run(model, data, replace(cfg, min_accuracy=1.0))
    with pytest.raises(InterpError, match="kind of site"):
        run(model, data, replace(cfg, kinds=("resid_pots",)))
    same = replace(data, answers=torch.stack([data.answers[:, 0]] * 2, dim=1))
    with pytest.raises(InterpError, match="cannot be divided"):
        run(model, same, cfg)
    with pytest.raises(InterpError, match="all of clean, corrupt"):
        load(model, PatchingConfig(clean="abc"))
    with pytest.raises(InterpError, match="ioi"):
        load(model, PatchingConfig(task="oii"))
    with pytest.raises(InterpError, match="tokens against"):
        load(model, PatchingConfig(clean="ab", corrupt="abc", right="a", wrong="b"))


def test_one_pair_has_no_unrelated_donor_and_still_its_other_controls() -> None:
    model = tiny_model("llama")
    data, cfg = example(model)
    result = run(model, data.take([0]), cfg)
    assert len(result.controls) == 3
    assert all(control.passed for control in result.controls[:2])


@pytest.mark.needs_model("smollm2-135m")
def test_all_sites_of_one_pair_equal_one_forward_each() -> None:
    model = load_model("smollm2-135m", check=False)
    pairs = SPEC.load(model, PatchingConfig(n_prompts=1))
    wave = in_a_wave(model, pairs)
    sites = all_sites(model, pairs)
    assert len(sites) == 420
    sample = [*sites[9::60], (29, 13)]
    for site, expected in zip(sample, one_by_one(model, pairs, sample), strict=True):
        assert float((wave[site] - expected).abs().max()) < 1e-4


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.needs_model("smollm2-135m")
def test_reference_numbers() -> None:
    """Card C1: endpoints, the hand-over from S2 to END, heads, and the shortcuts' correlations over heads."""
    model = load_model("smollm2-135m", check=False)
    cfg = PatchingConfig(kinds=("resid_post", "z"))
    data = load(model, cfg)
    ends = endpoints(model, data)
    assert ends.clean_mean == pytest.approx(5.60, abs=0.15)
    assert ends.corrupt_mean == pytest.approx(-5.37, abs=0.15)
    result = run(model, data, cfg)
    table = result.tables["effects"]
    table = table[(table.direction == "denoising") & (table.metric == "logit_diff")]
    effect = {
        (kind, layer, index): value
        for kind, layer, index, value in zip(table.kind, table.layer, table["index"], table.effect, strict=True)
    }
    for layer, at_s2, at_end in ((18, 1.022, 0.006), (20, 0.544, 0.419), (23, 0.064, 0.883), (29, 0.0, 1.0)):
        assert effect["resid_post", layer, 9] == pytest.approx(at_s2, abs=0.03)
        assert effect["resid_post", layer, 13] == pytest.approx(at_end, abs=0.03)
    for layer, head, value in ((23, 3, 0.464), (29, 1, 0.263), (20, 0, 0.224), (17, 4, 0.184), (29, 0, -0.227)):
        assert effect["z", layer, head] == pytest.approx(value, abs=0.03)
    for layer, head, value in ((24, 4, -0.223), (19, 2, 0.152)):
        assert effect["z", layer, head] == pytest.approx(value, abs=0.03)
    rows = result.tables["correlations"]
    columns = (rows["method"], rows["direction"], rows["kind"], rows["pearson"])
    correlation = {(m, d, k): value for m, d, k, value in zip(*columns, strict=True)}
    assert correlation["gradient", "denoising", "z"] == pytest.approx(0.944, abs=0.02)
    assert correlation["integrated gradient", "denoising", "z"] == pytest.approx(0.985, abs=0.02)
    assert result.headline["attribution_correlation"] == correlation["gradient", "denoising", "z"]
    assert result.headline["top_sites"][0] == "z.23 head 3: +0.46"
    assert [control.passed for control in result.controls] == [True] * 5


@pytest.mark.slow
@pytest.mark.needs_model("smollm2-135m")
def test_the_comparison_with_one_forward_per_site() -> None:
    """The values; the times are for `interp bench` to show."""
    found = compare_naive(load_model("smollm2-135m", check=False))
    assert found["n_sites"] == 420
    assert found["max_difference"] < 1e-4
    assert found["ratio"] > 0
