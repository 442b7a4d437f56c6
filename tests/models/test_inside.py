"""Values inside a forward: ops, replays, entries and views, on a module small enough to know every number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from interp.core.errors import InterpError, NeverFiredError, SiteError
from interp.core.sites import Part, Site
from interp.instrument.capture import capture
from interp.instrument.edits import add, edited, scale, set_to
from interp.models.family import Block, ModuleCall, Reach, Rule, Tap, View, register_block
from interp.models.model import LoadedModel
from interp.models.probe import verify


class Switched(nn.Module):
    """out = sigmoid(gate(x)) * body(x), and it returns the gate's logits beside it; the tail is a fused product."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.gate, self.body = nn.Linear(4, 6), nn.Linear(4, 6)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        raw = self.gate(x)
        return torch.sigmoid(raw) * torch.tanh(self.body(x)).sigmoid(), {"raw": raw}


class Network(nn.Module):
    """Two switched layers and a sum, tokens flattened in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Switched(), Switched()
        self.back = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.first(x)
        flat, _ = self.second(self.back(hidden).flatten(0, 1))
        return flat.unflatten(0, x.shape[:2])


def _replay(call: ModuleCall, tap: Tap) -> Any:
    module, x = call.module, call.args[0]
    raw = module.gate(x)
    gate = tap(Part.INPUT_GATE, torch.sigmoid(raw))
    return tap(Part.CELL, gate * torch.tanh(module.body(x)).sigmoid()), {"raw": raw}


HALF = View(
    read=lambda _m, x: x[..., ::2],
    write=lambda _m, x, new: torch.stack([new, x[..., 1::2]], dim=-1).flatten(-2),
)
SWITCHED = Block(
    name="switched",
    classes=("Switched",),
    has=("gate", "body"),
    parts={
        Part.SKIP_GATE: Reach(path="", side="op", op="sigmoid", axes=("...",)),
        Part.RESIDUAL_GATE: Reach(path="", side="op", op="sigmoid", nth=1, axes=("...",)),
        Part.EXIT_GATE: Reach(path="gate", view=HALF, axes=("...",)),
        Part.INPUT_GATE: Reach(path="", side="replay", replay=_replay, axes=("...",)),
        Part.CELL: Reach(path="", side="replay", replay=_replay, axes=("...",)),
        Part.HIDDEN: Reach(path="body", side="input", instead=Part.CELL, axes=("...",)),
    },
    rules=(
        Rule(
            text="sigmoid(gate(x)) == skip_gate",
            result=Part.SKIP_GATE,
            inputs=(Part.HIDDEN,),
            function=lambda module, x: torch.sigmoid(x @ module.gate.weight.T + module.gate.bias),
        ),
    ),
)
register_block(SWITCHED)


@pytest.fixture
def model() -> LoadedModel:
    return LoadedModel(Network())


X = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))


def _by_hand(network: Network, gate: Tensor | None = None) -> Tensor:
    """The network's output with the first layer's gate replaced."""
    own = network.first
    gate = torch.sigmoid(own.gate(X)) if gate is None else gate
    hidden = gate * torch.tanh(own.body(X)).sigmoid()
    return network.second(network.back(hidden))[0]


def test_ops_are_read_where_they_are(model: LoadedModel) -> None:
    with capture(model, ["first:skip_gate", "first:residual_gate"], stop=False) as acts:
        out = model(X)
    assert torch.equal(out, model.module(X))
    first = model.module.first
    assert torch.equal(acts["first:skip_gate"], torch.sigmoid(first.gate(X)))
    assert torch.equal(acts["first:residual_gate"], torch.tanh(first.body(X)).sigmoid())


@pytest.mark.parametrize("name", ["first:skip_gate", "first:input_gate"])
def test_an_edit_is_what_the_module_goes_on_with(model: LoadedModel, name: str) -> None:
    wanted = torch.full((2, 5, 6), 0.25)
    with capture(model, [name], stop=False) as acts, edited(model, [set_to(name, 0.25)]):
        out = model(X)
    assert torch.equal(acts[name], wanted)
    assert torch.allclose(out, _by_hand(model.module, wanted), atol=1e-6)


def test_a_replay_without_a_change_leaves_every_bit(model: LoadedModel) -> None:
    with edited(model, [scale("first:cell", 1.0)]):
        assert torch.equal(model(X), model.module(X))


def test_a_replay_changes_only_what_an_edit_changed(model: LoadedModel) -> None:
    with capture(model, ["first"]) as before:
        model(X)
    with capture(model, ["first"]) as after, edited(model, [add("first:cell", 1.0, at=2)]):
        model(X)
    moved = after["first"] - before["first"]
    assert torch.allclose(moved[:, 2], torch.ones(2, 6), atol=1e-6)
    assert torch.equal(moved[:, [0, 1, 3, 4]], torch.zeros(2, 4, 6))


@pytest.mark.parametrize("name", ["first:skip_gate", "first:input_gate"])
def test_gradients_of_gates_are_those_of_autograd(model: LoadedModel, name: str) -> None:
    gate = torch.sigmoid(model.module.first.gate(X)).detach().requires_grad_()
    (wanted,) = torch.autograd.grad(_by_hand(model.module, gate).square().sum(), gate)
    x = X.clone().requires_grad_()
    with capture(model, [name], grad=True) as acts:
        model(x).square().sum().backward()
    assert torch.allclose(acts.grad(name), wanted, atol=1e-6)
    (upstream,) = torch.autograd.grad(model.module(x).square().sum(), x)
    assert torch.allclose(x.grad, upstream, atol=1e-6)


def test_views_write_into_their_part(model: LoadedModel) -> None:
    with capture(model, ["first.gate"]) as before:
        model(X)
    with capture(model, ["first.gate"]) as after, edited(model, [add("first:exit_gate", 2.0)]):
        model(X)
    moved = after["first.gate"] - before["first.gate"]
    assert torch.allclose(moved[..., ::2], torch.full((2, 5, 3), 2.0), atol=1e-5)
    assert torch.equal(moved[..., 1::2], torch.zeros(2, 5, 3))


def test_what_can_only_be_read_says_what_to_edit(model: LoadedModel) -> None:
    with pytest.raises(SiteError, match=r"first:hidden can only be read; edit first:cell"):
        model.hub.add_writer(model.table.one("first:hidden"), lambda x: x)


def test_the_probe_checks_the_rules_of_blocks(model: LoadedModel) -> None:
    report = verify(model, X)
    assert report.passed, report.first_failure
    assert sum(check.name == "sigmoid(gate(x)) == skip_gate" for check in report.checks) == 2
    second = model.module.second
    second.forward = lambda x: (torch.sigmoid(second.gate(x) * 2) * second.body(x).sigmoid(), {"raw": second.gate(x)})
    failure = verify(model, X).first_failure
    assert failure is not None and failure.site == "second:skip_gate"


def test_an_op_that_is_not_called_is_an_error(model: LoadedModel) -> None:
    first = model.module.first
    first.forward = lambda x: (functional.hardsigmoid(first.gate(x)), {})
    with pytest.raises(NeverFiredError, match="first:skip_gate"), capture(model, ["first:skip_gate"]):
        model(X)


def test_nothing_stays_behind_after_an_error_inside(model: LoadedModel) -> None:
    def fail(_x: Tensor) -> Tensor:
        raise RuntimeError("broken")

    model.module.first.body.forward = fail
    with pytest.raises(RuntimeError, match="broken"), capture(model, ["first:skip_gate", "second:skip_gate"]):
        model(X)
    del model.module.first.body.forward
    assert not torch.overrides._is_torch_function_mode_enabled()  # pyright: ignore
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.module.modules())
    with capture(model, ["first:skip_gate"]) as acts:
        model(X)
    assert acts.receipt is not None and acts.receipt.calls == {"first:skip_gate": 1}


def test_block_sites_are_listed_parsed_and_matched(model: LoadedModel) -> None:
    assert Site(Part.SKIP_GATE, path="first") in model.sites()
    assert [str(site) for site in model.resolve("*:skip_gate")] == ["first:skip_gate", "second:skip_gate"]
    with pytest.raises(InterpError, match="first:skip_gate"):
        model.resolve("first:skip_gat")


class Routed(nn.Module):
    """Returns (sum, weights): entries of a tuple, tokens in one axis."""

    def forward(self, x: Tensor, *, power: Tensor) -> tuple[Tensor, Tensor]:
        return (x**power).sum(-1), x.softmax(-1)


def test_entries_and_keyword_arguments() -> None:
    register_block(
        Block(
            name="routed",
            classes=("Routed",),
            parts={
                Part.ROUTING: Reach(path="", item=1, flat=True, axes=("...",)),
                Part.MODALITY_GATE: Reach(path="", side="input", item="power", axes=("...",)),
            },
        )
    )

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Routed()

        def forward(self, x: Tensor) -> Tensor:
            total, weights = self.inner(x.flatten(0, 1), power=torch.tensor(2.0))
            return total + weights.max(-1).values

    model = LoadedModel(Outer())
    with capture(model, ["inner:routing", "inner:modality_gate"], stop=False) as acts:
        out = model(X)
    assert torch.equal(acts["inner:routing"], X.softmax(-1)) and acts["inner:routing"].shape == X.shape
    assert float(acts["inner:modality_gate"]) == 2
    with edited(model, [set_to("inner:modality_gate", 3.0)]):
        cubed = model(X)
    top = X.softmax(-1).max(-1).values.flatten()
    assert torch.allclose(out, X.square().sum(-1).flatten() + top, atol=1e-6)
    assert torch.allclose(cubed, X.pow(3).sum(-1).flatten() + top, atol=1e-5)
