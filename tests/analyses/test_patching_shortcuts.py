"""Attribution patching: closed forms, autograd by hand, the softmax repaired, cancellation, the exact check's bound."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from interp.analyses import patching_gradient
from interp.analyses.patching import PatchingConfig, example, run
from interp.analyses.patching_budget import calibrate, choose, most_missed
from interp.analyses.patching_gradient import atp_star, estimates, mean_gradient
from interp.analyses.patching_places import Grid, make_grids, sites_of
from interp.analyses.patching_plan import graph_rows
from interp.analyses.patching_runs import Intervention, Runs, make_runs
from interp.analyses.patching_scores import endpoints, sweep
from interp.core.errors import InterpError
from interp.core.sites import Part
from interp.instrument.capture import capture
from interp.instrument.edits import edited, patch_from
from interp.models.model import LoadedModel
from interp.models.tiny import tiny_model
from interp.tasks.base import PromptPairs
from interp.tasks.ioi import random_pairs

HOWS = [Intervention.DENOISE, Intervention.NOISE]


def attribution(function: Callable[..., Tensor], base: list[float], donor: list[float], n_steps: int) -> list[float]:
    """Attribution of the inputs of a function, with the averaging of the methods."""
    first, second = (torch.tensor(x, dtype=torch.float64) for x in (base, donor))

    def gradients(point: float) -> list[Tensor]:
        x = torch.lerp(first, second, point).requires_grad_()
        return list(torch.autograd.grad(function(*x), x))

    return ((second - first) * mean_gradient(gradients, n_steps)[0]).tolist()


def test_a_product_is_shared_out_exactly_by_midpoints_only() -> None:
    """y = a b, clean (2, 2), corrupted (1, 1): the change is -3."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        return a * b

    assert attribution(product, [2, 2], [1, 1], 0) == pytest.approx([-2, -2])
    assert attribution(product, [1, 1], [2, 2], 0) == pytest.approx([1, 1])  # from the other end, -1 each
    for n_steps in (1, 5):
        assert attribution(product, [2, 2], [1, 1], n_steps) == pytest.approx([-1.5, -1.5])


def test_saturation_is_missed_at_the_ends_and_found_between() -> None:
    """y = sigmoid(10 x), x from 1 to -1: the change is -0.9999."""

    def saturated(x: Tensor) -> Tensor:
        return torch.sigmoid(10 * x)

    assert attribution(saturated, [1], [-1], 0) == pytest.approx([-0.0009], abs=5e-5)
    assert attribution(saturated, [1], [-1], 20) == pytest.approx([-0.9999], abs=5e-4)
    assert attribution(saturated, [1], [-1], 5) == pytest.approx([-1.144], abs=5e-4)


def prepared(model: LoadedModel, pairs: PromptPairs, how: Intervention, *kinds: str) -> tuple[list[Grid], Runs]:
    grids = make_grids(model, pairs, kinds)
    return grids, make_runs(model, pairs, how, sites_of(grids))


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("n_steps", [0, 3])
def test_in_a_linear_network_estimates_are_the_exact_effects(how: Intervention, n_steps: int) -> None:
    """GPT-2 without norms, activations and choice of keys; every kind of site, and AtP* but for its missing sign."""
    model = tiny_model("gpt2", dtype=torch.float64)
    for block in model.module.transformer.h:
        block.ln_1, block.ln_2, block.mlp.act = nn.Identity(), nn.Identity(), nn.Identity()
        block.attn.c_attn.weight.data[:, :64] = 0
        block.attn.c_attn.bias.data[:64] = 0
    model.module.transformer.ln_f = nn.Identity()
    pairs = random_pairs(model, n=2, length=5)
    kinds = (
        "resid_pre",
        "resid_mid",
        "resid_post",
        "attn_out",
        "mlp_out",
        "v",
        "z",
        "neurons.1@END#each",
    )
    grids, runs = prepared(model, pairs, how, *kinds)
    ends = endpoints(model, pairs)
    found = estimates(model, runs, grids, ends.primary, n_steps=n_steps)
    exact = sweep(model, ends, grids, how, runs=runs)
    for grid in grids:
        np.testing.assert_allclose(found[grid.name], exact.moved[grid.name]["logit_diff"], atol=1e-8)


@pytest.mark.parametrize("n_steps", [0, 3])
def test_estimates_equal_gradients_taken_by_hand(n_steps: int) -> None:
    """Oracle: autograd on `inputs_embeds`, with the stream's gradient read off transformers' hidden states."""
    model = tiny_model("llama", dtype=torch.float64)
    pairs = random_pairs(model, n=2, length=5)
    grids, runs = prepared(model, pairs, Intervention.DENOISE, "resid_post")
    found = estimates(model, runs, grids, endpoints(model, pairs).primary, n_steps=n_steps)["resid_post"]
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
    np.testing.assert_allclose(found[:, 0], ((ends[1] - ends[0]) * total).sum(-1).numpy(), atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "mixtral"])
@pytest.mark.parametrize("how", [*HOWS, Intervention.MEAN, Intervention.GAUSSIAN])
def test_gradients_predict_small_patches(family: str, how: Intervention) -> None:
    """Causal oracle: of donors very near to the base, every kind of site has the effect that was predicted."""
    model = tiny_model(family, dtype=torch.float64)
    pairs = random_pairs(model, n=2, length=5)
    kinds = ["resid_mid", "attn_out", "q", "k@2", "v#all", "z@END", "pattern", "mlp_out@all"]
    kinds += {"mixtral": ["router_logits"], "gpt2": ["neurons@S2"]}.get(family, ["up", "gate_pre.1@S2#each"])
    grids, runs = prepared(model, pairs, how, *kinds)
    near = {site: torch.lerp(runs.base.base[site], donor, 1e-4) for site, donor in runs.donor.items()}
    runs = replace(runs, donor=near)
    ends = endpoints(model, pairs)
    found = estimates(model, runs, grids, ends.primary)
    exact = sweep(model, ends, grids, how, runs=runs)
    for grid in grids:
        moved = exact.moved[grid.name]["logit_diff"]
        # transformers' norms compute in float32, hence the second term
        np.testing.assert_allclose(found[grid.name], moved, atol=0.02 * np.abs(moved).max() + 3e-6, err_msg=grid.name)


def test_estimates_leave_the_gradients_of_the_weights_alone() -> None:
    model = tiny_model("gpt2")
    pairs = random_pairs(model, n=2, length=5)
    weight = next(iter(model.module.parameters()))
    weight.grad = torch.ones_like(weight)
    grids, runs = prepared(model, pairs, Intervention.DENOISE, "resid_post", "z", "q")
    metric = endpoints(model, pairs).primary
    estimates(model, runs, grids, metric, n_steps=2)
    atp_star(model, runs, grids, metric)
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert all(p.grad is None for p in model.module.parameters() if p is not weight)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("text", ["q", "k", "q@END", "k@S2#1", "k@each"])
def test_the_repaired_estimate_of_queries_and_keys_goes_through_their_softmax(family: str, text: str) -> None:
    """Oracle: the pattern of a whole forward with q or k replaced, and autograd on the pattern of the base run."""
    model = tiny_model(family, dtype=torch.float64)
    pairs = random_pairs(model, n=2, length=5)
    grids, runs = prepared(model, pairs, Intervention.DENOISE, text)
    (grid,) = grids
    found = estimates(model, runs, grids, endpoints(model, pairs).primary, fix_qk=True)[text]
    with capture(model, "pattern.*", grad=True) as acts:
        chosen = model(pairs.corrupt.ids)[:, -1].gather(1, pairs.answers)
        (chosen[:, 0] - chosen[:, 1]).sum().backward()
    with capture(model, f"{grid.part}.*") as donor:
        model(pairs.clean.ids)
    for i, j in np.ndindex(found.shape[1:]):
        place, site, pattern = grid.places[i][j], grid.places[i][j].sites[0], f"pattern.{grid.layers[i]}"
        at = torch.tensor(place.at) if isinstance(place.at, tuple) else place.at
        where = {} if place.unit is None else {"head": place.unit}
        with edited(model, patch_from(site, donor[site], at=at, **where)), capture(model, pattern) as moved:
            model(pairs.corrupt.ids)
        expected = ((moved[pattern] - acts[pattern].detach()) * acts.grad(pattern)).sum((1, 2, 3))
        np.testing.assert_allclose(found[:, i, j], expected.numpy(), atol=1e-6)


def test_dropping_layers_finds_what_direct_and_indirect_effects_hide() -> None:
    """Stream + a layer that takes away exactly what it was given: the gradient is 0, the sizes are not."""
    model = tiny_model("gpt2", n_layers=2, dtype=torch.float64)
    for block in model.module.transformer.h:
        block.ln_1, block.ln_2, block.mlp.act = nn.Identity(), nn.Identity(), nn.Identity()
        block.attn.c_proj.weight.data.zero_()
        for conv in (block.mlp.c_fc, block.mlp.c_proj):
            conv.weight.data.zero_()
            conv.bias.data.zero_()
    model.module.transformer.ln_f = nn.Identity()
    last = model.module.transformer.h[1].mlp
    last.c_fc.weight.data[:, :32] = torch.eye(32, dtype=torch.float64)
    last.c_proj.weight.data[:32] = -0.999 * torch.eye(32, dtype=torch.float64)  # not quite all of it
    pairs = random_pairs(model, n=2, length=5)
    pairs.corrupt.ids[:, -1] = pairs.clean.ids[:, -1] + 1  # the last token is what is read
    grids, runs = prepared(model, pairs, Intervention.NOISE, "resid_post.0@END")
    metric = endpoints(model, pairs).primary
    plain = estimates(model, runs, grids, metric)["resid_post.0@END"][:, 0, 0]
    star = atp_star(model, runs, grids, metric)["resid_post.0@END"][:, 0, 0]
    direct = np.abs(plain) / 0.001
    # layer 0 dropped: its output's own gradient stays, what is behind the stream is as it was; layer 1 dropped: direct
    np.testing.assert_allclose(star, np.abs(plain) + direct, rtol=1e-6)


def test_a_layer_drops_its_own_sites() -> None:
    """With two layers, a head of layer 0 counts only what is left with layer 1 dropped."""
    model = tiny_model("llama", n_layers=2, dtype=torch.float64)
    pairs = random_pairs(model, n=2, length=5)
    grids, runs = prepared(model, pairs, Intervention.NOISE, "z")
    metric = endpoints(model, pairs).primary
    star = atp_star(model, runs, grids, metric)["z"]
    with capture(model, ["attn_out.1", "mlp_out.1"]) as base:
        model(pairs.clean.ids)
    frozen = [patch_from(site, base[site]) for site in ("attn_out.1", "mlp_out.1")]
    with edited(model, frozen), capture(model, "z.0", grad=True) as acts:
        chosen = model(pairs.clean.ids)[:, -1].gather(1, pairs.answers)
        (chosen[:, 0] - chosen[:, 1]).sum().backward()
    with capture(model, "z.0") as donor:
        model(pairs.corrupt.ids)
    alone = ((donor["z.0"] - acts["z.0"].detach()) * acts.grad("z.0")).sum((1, 3)).abs()
    np.testing.assert_allclose(star[:, 0], alone.numpy(), atol=1e-9)


def test_rows_are_split_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    pairs = random_pairs(model, n=3, length=5)
    grids, runs = prepared(model, pairs, Intervention.GAUSSIAN, "z", "k", "mlp_out")
    metric = endpoints(model, pairs).primary
    whole = estimates(model, runs, grids, metric, n_steps=2, fix_qk=True)
    assert graph_rows(model, 5) > 30
    monkeypatch.setattr(patching_gradient, "graph_rows", lambda *_: 7)
    split = estimates(model, runs, grids, metric, n_steps=2, fix_qk=True)
    for name, values in whole.items():
        np.testing.assert_allclose(split[name], values, rtol=1e-4, atol=1e-4)


def test_refusals_of_the_shortcuts() -> None:
    model = tiny_model("llama")
    pairs = random_pairs(model, n=2, length=5)
    metric = endpoints(model, pairs).primary
    grids, runs = prepared(model, pairs, Intervention.ZERO, "z")
    with pytest.raises(InterpError, match="no donor run to walk to"):
        estimates(model, runs, grids, metric, n_steps=3)
    grids, runs = prepared(model, pairs, Intervention.NOISE, "q~2")
    with pytest.raises(InterpError, match="drop the window"):
        estimates(model, runs, grids, metric, fix_qk=True)


@pytest.mark.parametrize(("n", "drawn"), [(7, 3), (9, 4)])
def test_the_bound_is_the_largest_number_of_misses_that_is_not_ruled_out(n: int, drawn: int) -> None:
    """Oracle: every possible draw, counted."""
    for seen in range(drawn + 1):
        not_ruled_out = []
        for total in range(seen, n - drawn + seen + 1):
            draws = list(itertools.combinations([True] * total + [False] * (n - total), drawn))
            if sum(sum(draw) <= seen for draw in draws) / len(draws) > 0.05:
                not_ruled_out.append(total)
        assert most_missed(seen, drawn, n) == max(not_ruled_out)
    assert most_missed(0, n, n) == 0
    assert most_missed(0, 0, n) == n
    assert most_missed(0, 100, 100_000) / 100_000 == pytest.approx(0.0295, abs=1e-3)  # the rule of three


def test_the_bound_holds_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    bad = np.zeros(200, dtype=bool)
    bad[:17] = True
    held = [most_missed(int(rng.permutation(bad)[:40].sum()), 40, 200) >= 17 for _ in range(1000)]
    assert 0.94 <= np.mean(held) < 1


def plain_grid(n_layers: int, n: int) -> Grid:
    return Grid(
        name="z", part=Part.Z, layers=tuple(range(n_layers)), window=1, at=(None,) * n, units=tuple(range(n)),
        labels=tuple(map(str, range(n))), heads=True, noun="head",
    )  # fmt: skip


def test_a_budget_checks_the_top_and_a_random_tail_and_finds_what_was_planted() -> None:
    rng = np.random.default_rng(0)
    exact = 0.01 * rng.normal(size=(10, 10))
    exact[0, :10] = np.linspace(1, 2, 10)
    guess = exact * 2 + 1e-3 * rng.normal(size=exact.shape)
    guess[0, 9] = 0.0  # the largest of all is missed
    chosen = choose([plain_grid(10, 10)], {"z": guess}, 90, seed=3)
    assert len(chosen.top) == len(chosen.tail) == 45 and chosen.n_tail == 55
    assert not set(chosen.top) & set(chosen.tail)
    assert {cell[1:] for cell in chosen.top[:9]} == {(0, j) for j in range(9)}
    found = calibrate(chosen, {"z": guess}, {"z": exact})
    assert found.misses == sum(abs(exact[cell[1:]]) >= found.threshold for cell in chosen.tail)
    everything = choose([plain_grid(10, 10)], {"z": guess}, 200, seed=3)
    assert len(everything.cells) == 100
    drawn = [choose([plain_grid(10, 10)], {"z": guess}, 40, seed=seed) for seed in range(200)]
    seen = np.mean([("z", 0, 9) in one.tail for one in drawn])
    assert seen == pytest.approx(20 / 80, abs=0.12)  # each tail cell as likely


def test_calibration_of_a_perfect_and_of_a_doubled_shortcut() -> None:
    exact = {"z": np.linspace(-1, 1, 50).reshape(5, 10)}
    for factor in (1.0, 2.0):
        guess = {"z": factor * exact["z"]}
        found = calibrate(choose([plain_grid(5, 10)], guess, 20, seed=0), guess, exact)
        assert (found.pearson, found.spearman) == (pytest.approx(1), pytest.approx(1))
        assert found.slope == pytest.approx(1 / factor)
        assert found.misses == 0 and 0 < found.missed_at_most < 40
        assert found.largest_error == pytest.approx((factor - 1) * 1.0)
    sizes = {"z": np.abs(exact["z"])}
    chosen = choose([plain_grid(5, 10)], sizes, 20, seed=0)
    assert calibrate(chosen, sizes, exact, sizes=True).pearson == pytest.approx(1)
    assert calibrate(chosen, sizes, exact).pearson < 0.9, "a shortcut with signs must have them right"


def test_a_run_with_a_budget_measures_what_it_says_and_no_more() -> None:
    model = tiny_model("llama")
    data, cfg = example(model)
    whole = run(model, data, replace(cfg, kinds=("z", "mlp_out")))
    part = run(model, data, replace(cfg, kinds=("z", "mlp_out"), check_budget=6))
    measured = part.tables["effects"]
    assert 6 <= part.headline["n_checked"] <= 18 < part.headline["n_sites"]
    keys = ["direction", "kind", "layer", "index", "metric"]
    both = measured.merge(whole.tables["effects"], on=keys, suffixes=("", "_whole"))
    assert len(both) == len(measured)
    np.testing.assert_allclose(both["effect"], both["effect_whole"], atol=2e-3)
    rows = part.tables["calibration"]
    assert set(rows["method"]) == {"gradient", "integrated gradient", "AtP*"}
    assert (rows["n_top"] == 3).all() and (rows["n_checked_tail"] == 3).all()
    assert (rows["missed_at_most"] >= rows["misses"]).all()
    assert PatchingConfig().check_budget == 0
