"""A user's own gated MLP: registered in a few lines, then captured, edited and proven like any other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import interp
from interp.core.sites import Part
from interp.instrument.capture import capture
from interp.instrument.edits import edited, scale, zero
from interp.models import family
from interp.models.family import Reach, Rule
from interp.models.model import LoadedModel
from interp.models.probe import probe_tokens, verify
from interp.models.tiny import tiny_model
from interp.models.user_mlp import register_mlp
from tests.models import conformance


class Expand(nn.Module):
    """sigmoid with a learnt range: (1 + 2a) sigmoid(x) - a."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.25))

    def forward(self, x: Tensor) -> Tensor:
        return (1 + 2 * self.a) * torch.sigmoid(x) - self.a


class Expanded(nn.Module):
    """A user's MLP, with names of its own."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.opener, self.content = nn.Linear(width, inner), nn.Linear(width, inner, bias=False)
        self.squash, self.back = Expand(), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.squash(self.opener(x)) * self.content(x))


class Functional(nn.Module):
    """A fused projection, and a gate that no module returns."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.both, self.back = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        content, opener = self.both(x).chunk(2, dim=-1)
        return self.back(torch.tanh(opener) * content)


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registrations of one test are gone in the next."""
    monkeypatch.setattr(family, "_BLOCKS", {})


def with_mlp(kind: Any, layers: tuple[int, ...] = (0, 1), **sizes: Any) -> nn.Module:
    module: Any = tiny_model("llama", n_layers=2, **sizes).module
    torch.manual_seed(0)
    for layer in layers:
        module.model.layers[layer].mlp = kind(32, 48).to(module.dtype)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.35)
    return module.eval()


def register_expanded() -> None:
    register_mlp(
        Expanded,
        gate_pre="opener",
        gate="squash",
        up="content",
        down="back",
        rules=(
            Rule(
                text="(1 + 2a) sigmoid(gate_pre) - a == gate",
                result=Part.GATE,
                inputs=(Part.GATE_PRE,),
                function=lambda module, x: (1 + 2 * module.squash.a) * torch.sigmoid(x) - module.squash.a,
            ),
        ),
    )


def test_in_a_plain_network() -> None:
    interp.register_mlp(Expanded, gate_pre="opener", gate="squash", up="content", down="back")
    model = interp.load(nn.Sequential(nn.Linear(3, 8), Expanded(8, 5)))
    x = torch.randn(4, 3)
    with capture(model, ["1:gate_pre", "1:gate", "1:up", "1:neurons", "1:mlp_out"], stop=False) as acts:
        out = model(x)
    mlp: Any = model.module[1]  # type: ignore[index]
    inner = model.module[0](x)  # type: ignore[index]
    assert torch.equal(acts["1:gate_pre"], mlp.opener(inner)) and torch.equal(acts["1:up"], mlp.content(inner))
    assert torch.equal(acts["1:gate"], 1.5 * torch.sigmoid(mlp.opener(inner)) - 0.25)
    assert torch.equal(acts["1:neurons"], acts["1:gate"] * acts["1:up"]) and torch.equal(acts["1:mlp_out"], out)
    with edited(model, zero("1:gate")):
        assert torch.equal(model(x), mlp.back.bias.expand(4, 8))
    report = verify(model, x)
    assert report.passed, report.first_failure
    assert "gate * up == neurons" in {check.name for check in report.checks}


def test_inside_a_known_architecture() -> None:
    """`gate_pre.0` is the user's, and the family's other sites are still there."""
    register_expanded()
    model = interp.load(with_mlp(Expanded))
    assert model.table.name == "llama" and model.dims.d_mlp == 48
    names = {str(site) for site in model.sites()}
    assert {"gate_pre.0", "gate.1", "up.1", "neurons.0", "mlp_in.0", "resid_mid.1", "pattern.0"} <= names
    tokens = probe_tokens(model)
    with capture(model, ["mlp_in.1", "gate_pre.1", "model.layers.1.mlp:gate_pre", "mlp_out.1"]) as acts:
        model(tokens)
    mlp: Any = model.layers[1].mlp
    assert torch.equal(acts["gate_pre.1"], mlp.opener(acts["mlp_in.1"]))
    assert torch.equal(acts["gate_pre.1"], acts["model.layers.1.mlp:gate_pre"])
    assert torch.equal(model.weight("W_gate", 1), mlp.opener.weight.T)
    with capture(model, "mlp_out.1") as halved, edited(model, scale("gate.1", 0.0)):
        model(tokens)
    assert torch.equal(halved["mlp_out.1"], mlp.back.bias.expand_as(halved["mlp_out.1"]))


def test_the_probe_proves_a_users_mlp() -> None:
    register_expanded()
    model = interp.load(with_mlp(Expanded))
    report = verify(model)
    assert report.passed, report.first_failure
    done = {(check.name, check.site) for check in report.checks}
    for name, site in (
        ("mlp_in @ W_gate == gate_pre", "gate_pre.0"),
        ("mlp_in @ W_up == up", "up.1"),
        ("neurons @ W_down == mlp_out", "mlp_out.0"),
        ("gate * up == neurons", "neurons.1"),
        ("(1 + 2a) sigmoid(gate_pre) - a == gate", "model.layers.0.mlp:gate"),
    ):
        assert (name, site) in done


@pytest.mark.parametrize("what", ["capture", "edit", "gradient", "generation"])
def test_it_passes_what_a_family_must(what: str) -> None:
    register_expanded()
    dtype = torch.float64 if what == "gradient" else torch.float32
    getattr(conformance, f"check_{what}")(LoadedModel(module=with_mlp(Expanded, dtype=dtype)))


def test_a_wrong_registration_is_found() -> None:
    register_mlp(Expanded, gate_pre="content", gate="squash", up="opener", down="back")
    with pytest.raises(interp.InterpError, match="gate \\* up == neurons"):
        interp.load(with_mlp(Expanded))


def test_a_gate_that_no_module_returns() -> None:
    register_mlp(
        Functional,
        gate_pre=Reach(path="both", chunk=(1, 2)),
        gate="tanh()",
        up=Reach(path="both", chunk=(0, 2)),
        down="back",
    )
    model = interp.load(with_mlp(Functional))
    assert verify(model).passed
    with capture(model, ["gate_pre.0", "gate.0", "up.0", "neurons.0"]) as acts:
        model(probe_tokens(model))
    assert torch.equal(acts["gate.0"], torch.tanh(acts["gate_pre.0"]))
    assert torch.equal(acts["neurons.0"], acts["gate.0"] * acts["up.0"])
    mlp: Any = model.layers[0].mlp
    assert torch.equal(model.weight("W_up", 0), mlp.both.weight.T[:, :48])


def test_only_one_layer_is_the_users() -> None:
    register_expanded()
    model = interp.load(with_mlp(Expanded, layers=(1,)))
    assert model.table.reach(model.resolve("gate_pre.0")[0]).path == "model.layers.0.mlp.gate_proj"
    assert model.table.reach(model.resolve("gate_pre.1")[0]).path == "model.layers.1.mlp.opener"
    assert verify(model).passed


def test_another_class_of_the_same_name_is_left_alone() -> None:
    register_expanded()
    other = type("Expanded", (nn.Module,), {"forward": lambda _self, x: x})
    assert not interp.load(nn.Sequential(nn.Linear(3, 3), other())).table.block_sites


def test_without_registration_there_are_module_paths() -> None:
    model = interp.load(with_mlp(Expanded))
    assert model.table.name == "generic" and "model.layers.0.mlp.squash" in model.table.modules


def test_a_child_that_is_not_there_is_named_at_load() -> None:
    register_mlp(Expanded, gate_pre="opner", gate="squash", up="content", down="back")
    with pytest.raises(interp.InterpError, match="register_mlp was given for gate_pre 'opner'; nearest: opener"):
        interp.load(with_mlp(Expanded))
