"""Switching experts off and forcing them on, against sums over experts written out in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from interp.core.errors import InterpError
from interp.core.sites import Part, Site
from interp.instrument.capture import capture
from interp.instrument.edits import Edit, edited
from interp.instrument.experts import How, force_on, switch_off, usual_weights
from interp.models.model import LoadedModel
from interp.models.probe import probe_tokens
from interp.models.tiny import tiny_model

SITES = ["mlp_in.1", "router_logits.1", "router_weights.1", "router_experts.1", "routed_out.1", "mlp_out.1"]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_model("mixtral", n_layers=2, dtype=torch.float64)


def seen(model: LoadedModel, edits: Edit | list[Edit] | None = None) -> dict[str, Tensor]:
    """The sites of layer 1 and the logits, with and without edits."""
    tokens = probe_tokens(model)
    sites = [name for name in SITES if Site(Part(name.split(".")[0]), 1) in model.table.sites]
    with capture(model, sites, stop=False) as acts:
        if edits is None:
            logits = model(tokens)
        else:
            with edited(model, edits):
                logits = model(tokens)
    return {name: acts[name] for name in sites} | {"logits": logits}


def by_hand(model: LoadedModel, x: Tensor, weights: Tensor) -> Tensor:
    """sum over all experts e of weights[e] * expert_e(x), from the raw parameters."""
    block: Any = model.layers[1]
    experts = block.mlp.experts
    total = torch.zeros_like(x)
    for e in range(weights.shape[-1]):
        gate, up = (x @ experts.gate_up_proj[e].detach().T).chunk(2, dim=-1)
        out = (torch.nn.functional.silu(gate) * up) @ experts.down_proj[e].detach().T
        total += weights[..., e : e + 1] * out
    return total


def test_switching_nobody_off_changes_nothing(model: LoadedModel) -> None:
    plain = seen(model)
    for how in ("renormalise", "drop", "replace"):
        with edited(model, switch_off("router_weights.1", [], how)):  # type: ignore[arg-type]
            assert torch.equal(model(probe_tokens(model)), plain["logits"])


def test_renormalise(model: LoadedModel) -> None:
    plain, edit = seen(model), seen(model, switch_off("router_weights.1", [0, 3]))
    weights, before = edit["router_weights.1"], plain["router_weights.1"]
    assert not weights[..., [0, 3]].any()
    alive = (before[..., [1, 2, 4, 5]] != 0).any(-1)
    assert 0 < int((before[..., [0, 3]] != 0).any(-1).sum()), "some token had chosen one of them"
    assert torch.allclose(weights.sum(-1)[alive], torch.ones_like(weights.sum(-1))[alive].to(weights), atol=1e-6)
    assert not weights.sum(-1)[~alive].any()
    untouched = ~(before[..., [0, 3]] != 0).any(-1)
    assert torch.equal(weights[untouched], before[untouched])
    others = before[..., [1, 2, 4, 5]]
    expected = others / others.sum(-1, keepdim=True).clamp_min(1e-30)
    assert torch.allclose(weights[..., [1, 2, 4, 5]], expected, atol=1e-6)
    assert torch.allclose(edit["routed_out.1"], by_hand(model, plain["mlp_in.1"], weights), atol=1e-10)


def test_drop(model: LoadedModel) -> None:
    plain, edit = seen(model), seen(model, switch_off("router_weights.1", 3, "drop"))
    expected = plain["router_weights.1"].clone()
    expected[..., 3] = 0
    assert torch.equal(edit["router_weights.1"], expected)
    assert torch.allclose(edit["routed_out.1"], by_hand(model, plain["mlp_in.1"], expected), atol=1e-10)


def test_replace_lets_the_next_expert_in(model: LoadedModel) -> None:
    plain, edit = seen(model), seen(model, switch_off("router_weights.1", [0, 3], "replace"))
    logits = plain["router_logits.1"].clone()
    logits[..., [0, 3]] = -torch.inf
    best = logits.topk(2).indices.sort().values
    assert torch.equal(edit["router_experts.1"].sort().values, best)
    assert not torch.equal(edit["router_experts.1"], plain["router_experts.1"])
    weights = torch.zeros_like(logits).scatter(-1, best, logits.gather(-1, best).softmax(-1))
    assert torch.allclose(edit["router_weights.1"].to(weights), weights, atol=1e-6)
    assert torch.allclose(edit["routed_out.1"], by_hand(model, plain["mlp_in.1"], weights), atol=1e-6)


@pytest.mark.parametrize("how", ["renormalise", "drop"])
def test_all_experts_off_leave_nothing_of_the_mixture(model: LoadedModel, how: How) -> None:
    edit = seen(model, switch_off("router_weights.1", range(6), how))
    assert not edit["routed_out.1"].any() and not edit["mlp_out.1"].any()


def test_experts_that_have_nobody_to_replace_them_get_no_weight(model: LoadedModel) -> None:
    edit = seen(model, switch_off("router_weights.1", range(5), "replace"))  # one is left, a token has two slots
    assert torch.equal(edit["router_weights.1"], torch.tensor([0, 0, 0, 0, 0, 1.0]).expand(2, 12, 6))


def test_all_experts_off_leave_the_shared_one() -> None:
    shared = tiny_model("deepseek-v3", n_layers=2)
    with (
        capture(shared, ["routed_out.1", "shared_out.1", "mlp_out.1"]) as acts,
        edited(shared, switch_off("router_weights.1", range(8))),
    ):
        shared(probe_tokens(shared))
    assert not acts["routed_out.1"].any()
    assert torch.equal(acts["mlp_out.1"], acts["shared_out.1"]) and acts["mlp_out.1"].any()


def test_force_on_takes_the_weakest_slot(model: LoadedModel) -> None:
    plain, edit = seen(model), seen(model, force_on("router_weights.1", 4, weight=0.7))
    before, after = plain["router_weights.1"], edit["router_weights.1"]
    had = before[..., 4] != 0
    assert 0 < int(had.sum()) < had.numel()
    assert torch.equal(after[had], before[had])
    strongest = before.max(-1, keepdim=True)
    expected = torch.zeros_like(before).scatter(-1, strongest.indices, strongest.values)
    expected[..., 4] = 0.7
    expected = expected / expected.sum(-1, keepdim=True)
    assert torch.allclose(after[~had], expected[~had], atol=1e-6)
    assert edit["router_experts.1"].shape == plain["router_experts.1"].shape
    assert bool((edit["router_experts.1"] == 4).any(-1).all())
    assert torch.allclose(edit["routed_out.1"], by_hand(model, plain["mlp_in.1"], after), atol=1e-10)


def test_force_on_with_the_mean_of_the_chosen(model: LoadedModel) -> None:
    plain, after = seen(model)["router_weights.1"], seen(model, force_on("router_weights.1", 4))["router_weights.1"]
    new = plain[..., 4] == 0
    strongest = plain[new].max(-1).values
    assert torch.allclose(after[new][:, 4], 0.5 / (0.5 + strongest), atol=1e-6)  # two slots that sum to 1: mean 0.5


def test_force_on_several_and_too_many(model: LoadedModel) -> None:
    after = seen(model, force_on("router_weights.1", [1, 4]))["router_weights.1"]
    assert torch.equal(after != 0, torch.tensor([False, True, False, False, True, False]).expand_as(after))
    with pytest.raises(InterpError, match="3 experts are forced on at router_weights.1, where a token has 2"):
        seen(model, force_on("router_weights.1", [0, 1, 4]))


def test_usual_weights() -> None:
    weights = torch.tensor([[[0.6, 0.4, 0.0, 0.0], [0.0, 0.8, 0.2, 0.0]]])
    assert torch.allclose(usual_weights(weights), torch.tensor([0.6, 0.6, 0.2, 0.5]))


def test_usual_weights_as_forced_weights(model: LoadedModel) -> None:
    plain = seen(model)["router_weights.1"]
    usual = usual_weights(plain)
    after = seen(model, force_on("router_weights.1", 4, weight=usual))["router_weights.1"]
    new = plain[..., 4] == 0
    strongest = plain[new].max(-1).values
    assert torch.allclose(after[new][:, 4], usual[4] / (usual[4] + strongest), atol=1e-6)


def test_only_the_positions_asked_for(model: LoadedModel) -> None:
    plain, edit = seen(model), seen(model, switch_off("router_weights.1", range(6), at=[2, 5]))
    off = torch.zeros(12, dtype=torch.bool)
    off[[2, 5]] = True
    assert not edit["routed_out.1"][:, off].any()
    assert torch.equal(edit["routed_out.1"][:, ~off], plain["routed_out.1"][:, ~off])


@pytest.mark.parametrize("how", ["renormalise", "drop", "replace"])
def test_generation_is_edited_with_and_without_a_cache(how: How) -> None:
    mixtral = tiny_model("mixtral", n_layers=2)
    prompt = probe_tokens(mixtral)
    plain = mixtral.generate(prompt, n_new=6)
    found = []
    for use_cache in (True, False):
        with edited(mixtral, switch_off("router_weights.*", [0, 1, 2], how), scope="new"):
            found.append(mixtral.generate(prompt, n_new=6, use_cache=use_cache))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], plain)


def test_a_planted_router() -> None:
    """One expert answers to a direction that only the prompts with a marked token have: the contrast finds it."""
    planted = tiny_model("mixtral", n_layers=2, seed=3)
    module: Any = planted.module
    marked, expert = 65, 4
    direction = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(0)), dim=0)
    with torch.no_grad():
        rows = module.model.embed_tokens.weight
        rows -= (rows @ direction)[:, None] * direction
        rows[marked] = 60 * direction
        block = module.model.layers[0]
        block.self_attn.o_proj.weight -= direction[:, None] * (direction @ block.self_attn.o_proj.weight)
        block.post_attention_layernorm.weight.fill_(1)
        block.mlp.gate.weight[expert] = 8 * direction
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(66, 200, (16, 8), generator=generator)
    prompts[:8, [1, 3, 6]] = marked
    with capture(planted, "router_weights.0") as acts:
        planted(prompts)
    used = acts["router_weights.0"].mean(1)
    contrast = used[:8].mean(0) - used[8:].mean(0)
    assert int(contrast.argmax()) == expert
    spread = torch.stack([_shuffled(used, generator).max() for _ in range(500)])
    assert float((spread >= contrast[expert]).float().mean()) < 0.01
    with capture(planted, "router_weights.0") as acts, edited(planted, switch_off("router_weights.0", expert)):
        planted(prompts)
    assert not acts["router_weights.0"][..., expert].any()
    assert torch.allclose(acts["router_weights.0"].sum(-1), torch.ones(16, 8), atol=1e-6)


def _shuffled(used: Tensor, generator: torch.Generator) -> Tensor:
    order = torch.randperm(len(used), generator=generator)
    return used[order[:8]].mean(0) - used[order[8:]].mean(0)


def test_sites_may_be_patterns_or_the_logits(model: LoadedModel) -> None:
    with edited(model, switch_off("router_logits.*", 0)) as receipts:
        model(probe_tokens(model))
    assert [str(receipt.site) for receipt in receipts] == ["router_weights.0", "router_weights.1"]
    edit = switch_off(Site(Part.ROUTER_WEIGHTS, 1), 0, "replace")
    assert str(edit.site) == "router_logits.1"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: switch_off("mlp_out.1", 0), "'mlp_out.1' is no router; name router_weights, e.g. router_weights.1"),
        (lambda: switch_off(Site(Part.UP, 1), 0), "up.1 is no router"),
    ],
)
def test_refusals_at_once(make: Any, message: str) -> None:
    with pytest.raises(InterpError, match=message):
        make()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (switch_off("router_weights.1", range(6), "replace"), "no expert of router_logits.1 is left to replace"),
        (switch_off("router_weights.1", 6), "no expert 6 at router_weights.1: it has experts 0 to 5"),
        (force_on("router_weights.1", 2, weight=0.0), "a weight of 0 does not force an expert on"),
        (force_on("router_weights.1", 2, weight=torch.ones(4)), "weights of shape .4,. do not fit"),
    ],
)
def test_refusals_in_the_forward(model: LoadedModel, edit: Edit, message: str) -> None:
    with pytest.raises(InterpError, match=message):
        seen(model, edit)
