"""Every kind of block in a network of its own: its sites and what each gate means.

`test_families` runs capture, edits and gradients on the same networks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from interp.core.errors import SiteError
from interp.instrument.capture import capture
from interp.instrument.edits import edited, scale, set_to, zero
from interp.models.blocks import known_blocks
from interp.models.blocks.residual import parameter_gate
from interp.models.blocks.routed import function_gate
from interp.models.family import Block, register_block
from interp.models.model import LoadedModel
from interp.models.probe import verify
from tests.models import conformance, networks
from tests.models.networks import around, filled, noise

IMAGE, TOKENS = (2, 3, 6, 6), (2, 5, 4)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], set[str]]] = {
    "SEModule": (lambda: around(networks.SEModule(8), "image", 8), IMAGE, {"se_gate_pre", "se_gate"}),
    "SqueezeExcite": (lambda: around(networks.SqueezeExcite(8), "image", 8), IMAGE, {"se_gate_pre", "se_gate"}),
    "SpatialGatingUnit": (lambda: around(networks.SpatialGatingUnit(), "tokens", 12, 6), TOKENS, {"spatial_gate"}),
    "GPSA": (lambda: around(networks.GPSA(), "tokens", 8), (2, 9, 4), {"position_gate_pre", "position_gate"}),
    "GluMlp": (
        lambda: around(networks.GluMlp(), "tokens", 6),
        TOKENS,
        {"gate_pre", "gate", "up", "neurons", "mlp_out"},
    ),
    "SwiGLUPacked": (
        lambda: around(networks.GluMlp(gate_last=False), "tokens", 6),
        TOKENS,
        {"gate_pre", "gate", "up", "neurons", "mlp_out"},
    ),
    "GluMlp conv": (
        lambda: around(networks.GluMlp(use_conv=True), "image", 6),
        IMAGE,
        {"gate_pre", "gate", "up", "neurons", "mlp_out"},
    ),
    "SwiGLU": (
        lambda: around(networks.SwiGLU(), "tokens", 6),
        TOKENS,
        {"gate_pre", "gate", "up", "neurons", "mlp_out"},
    ),
    "SwiGLUFFN": (
        lambda: around(networks.SwiGLUFFN(), "tokens", 6),
        TOKENS,
        {"gate_pre", "gate", "up", "neurons", "mlp_out"},
    ),
    "AttentionBlock": (lambda: around(networks.AttentionBlock(), "image", 4), IMAGE, {"skip_gate"}),
    "ReZero": (lambda: around(networks.ReZero(), "tokens", 6), TOKENS, {"residual_gate"}),
    "GatedSkip": (lambda: around(networks.GatedSkip(), "tokens", 6), TOKENS, {"residual_gate"}),
    "EarlyExit": (lambda: around(networks.EarlyExit(), "tokens", 6), TOKENS, {"exit_gate"}),
    "GatedMultimodalUnit": (lambda: around(networks.GatedMultimodalUnit(), "tokens", 6), TOKENS, {"modality_gate"}),
    "DenseCapsule": (
        lambda: around(networks.DenseCapsule(), "tokens", 6, 4),
        TOKENS,
        {"routing.0", "routing.1", "routing.2"},
    ),
}


def opened(name: str, dtype: torch.dtype = torch.float32) -> tuple[LoadedModel, Tensor]:
    make, shape, _ = CASES[name]
    return LoadedModel(filled(make(), dtype=dtype)), noise(*shape, dtype=dtype)


@pytest.mark.parametrize("name", CASES)
def test_sites_of_a_block(name: str) -> None:
    model, _ = opened(name)
    assert {str(site).removeprefix("block:") for site in model.table.block_sites} == CASES[name][2]


@pytest.mark.parametrize(
    ("name", "gate"), [("SEModule", "se_gate"), ("SqueezeExcite", "se_gate"), ("AttentionBlock", "skip_gate")]
)
def test_a_closed_gate_lets_nothing_through(name: str, gate: str) -> None:
    model, x = opened(name)
    with capture(model, ["block"]) as acts, edited(model, [zero(f"block:{gate}")]):
        model(x)
    assert float(acts["block"].abs().max()) == 0
    with capture(model, ["block", "before"]) as acts, edited(model, [set_to(f"block:{gate}", 1.0)]):
        model(x)
    assert torch.equal(acts["block"], acts["before"])


@pytest.mark.parametrize(("name", "which"), [("GluMlp", 1), ("SwiGLUPacked", 0), ("GluMlp conv", 1)])
def test_the_gate_is_the_half_that_goes_through_the_activation(name: str, which: int) -> None:
    model, x = opened(name)
    seen: list[Tensor] = []
    model.module.block.act.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with capture(model, ["block:gate_pre", "block:up", "block.fc1"], stop=False) as acts:
        model(x)
    halves = acts["block.fc1"].chunk(2, dim=1 if "conv" in name else -1)
    assert torch.equal(acts["block:gate_pre"], seen[0]) and torch.equal(seen[0], halves[which])
    assert torch.equal(acts["block:up"], halves[1 - which])


def test_reading_a_gate_first_mlp_as_gate_last_fails_the_probe() -> None:
    model, x = opened("SwiGLUPacked")
    model.module.block.gate_last = True
    wrong = LoadedModel(model.module)
    model.module.block.forward = lambda x: networks.GluMlp.forward(_gate_first(model.module.block), x)
    failure = verify(wrong, x).first_failure
    assert failure is not None and failure.site == "block:gate"


def _gate_first(block: nn.Module) -> nn.Module:
    twin = networks.GluMlp(gate_last=False)
    vars(twin)["_modules"] = block._modules
    return twin


def test_convit_with_closed_gates_attends_by_content_alone() -> None:
    model, x = opened("GPSA")
    block = model.module.block
    seen: list[Tensor] = []
    block.attn_drop.register_forward_pre_hook(lambda _m, args: seen.append(args[0].clone()))
    for value in (-1e9, 1e9):
        with edited(model, [set_to("block:position_gate_pre", value)]):
            model(x)
    by_content, by_position = seen
    other = noise(2, 9, 4, seed=7)
    with edited(model, [set_to("block:position_gate_pre", 1e9)]):
        model(other)
    assert torch.equal(seen[2], by_position)  # positions alone do not depend on the image
    assert not torch.allclose(by_content, by_position, atol=1e-2)
    assert torch.equal(block.gating_param, model.module.state_dict()["block.gating_param"])


def test_one_head_of_convit_is_gated_alone() -> None:
    model, x = opened("GPSA")
    seen: list[Tensor] = []
    model.module.block.attn_drop.register_forward_pre_hook(lambda _m, args: seen.append(args[0].clone()))
    model(x)
    with edited(model, [set_to("block:position_gate_pre", -1e9, head=2)]) as receipts:
        model(x)
    moved = (seen[1] - seen[0]).abs().amax(dim=(0, 2, 3))
    assert float(moved[2]) > 1e-2 and float(moved[[0, 1, 3]].max()) == 0
    assert receipts[0].fired
    with pytest.raises(SiteError, match="edit block:position_gate_pre"), edited(model, [zero("block:position_gate")]):
        model(x)


def test_a_parameter_is_its_own_again_after_an_edit() -> None:
    model, x = opened("ReZero")
    block, plain = model.module.block, model(x)
    before = block.alpha.detach().clone()
    with edited(model, [zero("block:residual_gate")]), capture(model, ["block", "before"]) as acts:
        model(x)
    assert torch.equal(acts["block"], acts["before"])  # x + 0 F(x)
    assert torch.equal(block.alpha, before) and "alpha" not in vars(block) and torch.equal(model(x), plain)
    block.branch.forward = _fail
    with pytest.raises(RuntimeError, match="broken"), edited(model, [zero("block:residual_gate")]):
        model(x)
    assert "alpha" not in vars(block) and torch.equal(block.alpha, before)


def _fail(_x: Tensor) -> Tensor:
    raise RuntimeError("broken")


def test_the_gradient_of_a_parameter_site_is_the_parameters() -> None:
    model, x = opened("ReZero")
    block = model.module.block
    (wanted,) = torch.autograd.grad(model.module(x).square().sum(), block.alpha)
    for trained in (True, False):
        block.alpha.requires_grad_(trained)
        with capture(model, ["block:residual_gate"], grad=True) as acts:
            model(x).square().sum().backward()
        assert torch.allclose(acts.grad("block:residual_gate"), wanted) and block.alpha.requires_grad is trained


def test_capsule_routing_per_iteration() -> None:
    """The first iteration shares evenly; a vote routed by hand decides the last."""
    model, x = opened("DenseCapsule")
    with capture(model, ["block:routing.*"]) as acts:
        model(x)
    assert torch.allclose(acts["block:routing.0"], torch.full((2, 3, 5), 1 / 3))
    for step in range(3):
        assert torch.allclose(acts[f"block:routing.{step}"].sum(1), torch.ones(2, 5))
    assert not torch.allclose(acts["block:routing.2"], acts["block:routing.0"], atol=1e-3)
    chosen = torch.zeros(2, 3, 5)
    chosen[:, 1] = 1
    with edited(model, [set_to("block:routing.2", chosen)]), capture(model, ["block"]) as after:
        model(x)
    assert float(after["block"][:, [0, 2]].abs().max()) == 0 and float(after["block"][:, 1].abs().min()) > 0
    with edited(model, [set_to("block:routing.0", chosen)]), capture(model, ["block:routing.1"]) as later:
        model(x)
    assert not torch.allclose(later["block:routing.1"], acts["block:routing.1"], atol=1e-3)


def test_leaving_early_and_one_modality() -> None:
    model, x = opened("EarlyExit")
    with edited(model, [set_to("block:exit_gate", 1.0)]), capture(model, ["block", "before"]) as acts:
        model(x)
    assert torch.allclose(acts["block"], model.module.block.now(acts["before"]), atol=1e-6)
    model, x = opened("GatedMultimodalUnit")
    with edited(model, [zero("block:modality_gate")]), capture(model, ["block", "before"]) as acts:
        model(x)
    second = acts["before"].chunk(2, dim=-1)[1]
    assert torch.allclose(acts["block"], model.module.block.second(second).tanh(), atol=1e-6)


def test_a_skipped_layer_is_the_identity() -> None:
    model, x = opened("GatedSkip")
    with edited(model, [scale("block:residual_gate", 0.0)]), capture(model, ["block", "before"]) as acts:
        model(x)
    assert torch.equal(acts["block"], acts["before"])


class Mine(nn.Module):
    """A user's own block: a scalar factor per channel, and a gate that is the second sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x) * torch.sigmoid(-x) * self.strength


def test_a_block_of_ones_own_in_one_line() -> None:
    first = function_gate("Mine", part=conformance.Part.SKIP_GATE, nth=1, axes=("batch", "pos", "channel"))
    register_block(first)
    register_block(parameter_gate("Elsewhere", parameter="strength"))
    model = LoadedModel(filled(around(Mine(), "tokens", 6)))
    with capture(model, ["block:skip_gate", "before"], stop=False) as acts:
        model(noise(*TOKENS))
    assert torch.equal(acts["block:skip_gate"], torch.sigmoid(-acts["before"]))


def test_a_namesake_without_the_attributes_is_no_block() -> None:
    class SEModule(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    assert LoadedModel(around(SEModule(), "image", 3)).table.block_sites == ()


class AttentionGate(nn.Module):
    """A U-Net attention gate whose psi is a convolution alone: the sigmoid comes after it."""

    def __init__(self) -> None:
        super().__init__()
        self.W_g, self.W_x, self.psi = (nn.Conv2d(3, n, 1) for n in (3, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.psi(torch.relu(self.W_g(x) + self.W_x(x))))


class EarlyExit(nn.Module):
    """A namesake with another sigmoid in a branch, which runs first."""

    def __init__(self) -> None:
        super().__init__()
        self.branch, self.gate = nn.Sequential(nn.Linear(6, 6), nn.Sigmoid()), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.branch(x)
        return hidden * torch.sigmoid(self.gate(hidden))


def test_a_gate_is_what_the_sigmoid_returns_not_what_goes_in() -> None:
    model, x = LoadedModel(filled(nn.Sequential(AttentionGate()))), noise(2, 3, 5, 5)
    with capture(model, ["0:skip_gate", "0.psi"]) as acts:
        model(x)
    assert torch.equal(acts["0:skip_gate"], torch.sigmoid(acts["0.psi"]))
    with edited(model, [set_to("0:skip_gate", 1.0)]):
        assert torch.equal(model(x), x)


class GatedSkip(nn.Module):
    """A branch that is gated itself, by a function; and a gate with its own temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.branch, self.inner, self.gate = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.branch(x) * torch.sigmoid(self.inner(x))
        return x + torch.sigmoid(self.gate(x)) * inner


def test_another_sigmoid_that_runs_first_is_not_the_gate() -> None:
    for make, shape, part in (
        (EarlyExit, (2, 6), "exit_gate"),
        (GatedSkip, (2, 5, 6), "residual_gate"),
    ):
        model, x = LoadedModel(filled(nn.Sequential(make()))), noise(*shape)
        with capture(model, [f"0:{part}", "0.gate"], stop=False) as acts:
            model(x)
        assert torch.equal(acts[f"0:{part}"], torch.sigmoid(acts["0.gate"]))
        assert verify(model, x).passed
        with edited(model, [set_to("0.gate", 0.25)]), capture(model, [f"0:{part}"]) as edited_acts:
            model(x)
        assert torch.equal(edited_acts[f"0:{part}"], torch.full_like(acts["0.gate"], 0.25).sigmoid())


def test_reading_the_branchs_sigmoid_as_the_gate_fails_the_probe() -> None:
    """The site as it would be without telling whose sigmoid it is."""

    class Renamed(GatedSkip):
        pass

    register_block(
        dataclasses.replace(
            block := block_of_class("GatedSkip"),
            name="wrong",
            classes=("Renamed",),
            parts={part: dataclasses.replace(reach, of=None, only=False) for part, reach in block.parts.items()},
        )
    )
    failure = verify(LoadedModel(filled(nn.Sequential(Renamed()))), noise(2, 5, 6)).first_failure
    assert failure is not None and failure.name == "sigmoid(gate's output) == residual_gate"


def block_of_class(name: str) -> Block:
    return known_blocks()[name][1]


class TwiceGated(networks.GatedSkip):
    def forward(self, x: Tensor) -> Tensor:
        return (1 - torch.sigmoid(self.gate(x))) * x + torch.sigmoid(self.gate(x)) * self.branch(x)


class BusyUnit(networks.GatedMultimodalUnit):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.sigmoid(x)


@pytest.mark.parametrize(("make", "part"), [(TwiceGated, "residual_gate"), (BusyUnit, "modality_gate")])
def test_two_sigmoids_that_could_be_the_gate_are_refused(make: Callable[[], nn.Module], part: str) -> None:
    model = LoadedModel(filled(nn.Sequential(make())))
    with pytest.raises(SiteError, match="more than once"), capture(model, [f"0:{part}"]):
        model(noise(2, 5, 6))
    with pytest.raises(SiteError, match="more than once"):
        verify(model, noise(2, 5, 6))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("AttentionBlock", "skip * skip_gate == output"),
        ("ReZero", "the output is affine in residual_gate"),
        ("GatedSkip", "the output is affine in residual_gate"),
        ("GatedMultimodalUnit", "the output is affine in modality_gate"),
    ],
)
def test_the_probe_fails_where_the_output_is_another_function_of_the_gate(name: str, said: str) -> None:
    model, x = opened(name)
    assert verify(model, x).passed
    plain = model.module.block.forward
    model.module.block.forward = lambda x: plain(x) ** 2
    failure = verify(model, x).first_failure
    assert failure is not None and failure.name == said
