"""More faults that must not pass silently, beside those of test_faults and test_faults_wrapped.

Names, users' hooks, padding on both sides, tied parameters, edits that return something else, contexts that close in
any order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from interp.core.errors import InterpError, NeverFiredError, SiteError
from interp.instrument.capture import capture
from interp.instrument.edits import Edit, add, edited, scale, zero
from interp.models.model import LoadedModel
from interp.models.parameters import shadow
from interp.models.tiny import tiny_model


def tokens(model: LoadedModel, shape: tuple[int, int] = (2, 7), seed: int = 0) -> Tensor:
    assert model.dims.d_vocab is not None
    return torch.randint(model.dims.d_vocab, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("act", ["capture", "edit"])
@pytest.mark.parametrize(
    ("wrong", "right"), [("gat.1", "gate.1"), ("neuron.2", "neurons.2"), ("model.layers.1.mlp.up_pro", "up_proj")]
)
def test_a_misspelt_site_names_the_nearest_and_hooks_nothing(act: str, wrong: str, right: str) -> None:
    model = tiny_model("llama")
    opened = capture(model, wrong) if act == "capture" else edited(model, zero(wrong))
    with pytest.raises(SiteError, match=f"{wrong}.*nearest.*{right}"), opened:
        model(tokens(model))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())


@dataclass
class Pair:
    """What a module may return."""

    main: Tensor
    more: Tensor


class Twice(nn.Module):
    """Returns a dataclass; used twice by the network."""

    def forward(self, x: Tensor) -> Pair:
        return Pair(main=x + 1, more=-x)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.twice = Twice()

    def forward(self, x: Tensor) -> Tensor:
        first = self.twice(x)
        return self.twice(first.main * 2).main + first.more


def test_a_dataclass_is_read_and_edited_at_every_use_and_not_written_to() -> None:
    made: list[Pair] = []
    model, x = LoadedModel(Network()), torch.tensor([[1.0, 2.0]])
    model.module.get_submodule("twice").register_forward_hook(lambda _m, _a, out: made.append(out))
    with capture(model, "twice") as acts:
        plain = model(x)
    with edited(model, scale("twice", 10.0)) as receipts, capture(model, "twice") as scaled:
        out = model(x)
    assert torch.equal(plain, (x + 1) * 2 + 1 - x)
    assert [a.tolist() for a in acts.calls("twice")] == [(x + 1).tolist(), ((x + 1) * 2 + 1).tolist()]
    assert torch.equal(out, ((x + 1) * 10 * 2 + 1) * 10 - x)
    assert torch.equal(scaled.calls("twice")[1], out + x)
    assert receipts[0].n_calls == 2
    assert torch.equal(made[2].main, x + 1)  # what the module itself returned is as it was


def test_users_hooks_before_and_after_run_in_their_order_and_stay() -> None:
    """A hook registered first runs first: what it changes is captured. One registered later sees the edit."""
    model = tiny_model("llama")
    ids, layer = tokens(model), model.layers[1]
    seen: dict[str, Tensor] = {}

    def look(name: str, add_: float) -> Callable[..., Tensor]:
        def hook(_m: nn.Module, _a: object, out: Tensor) -> Tensor:
            seen[name] = out
            return out + add_

        return hook

    before = layer.register_forward_hook(look("before", 1.0))
    with edited(model, add("resid_post.1", 10.0)), capture(model, "resid_post.1", stop=False) as acts:
        after = layer.register_forward_hook(look("after", 100.0))
        model(ids)
    torch.testing.assert_close(acts["resid_post.1"], seen["before"] + 1.0 + 10.0)
    assert torch.equal(seen["after"], acts["resid_post.1"])
    assert set(layer._forward_hooks) == {before.id, after.id}
    with capture(model, ["resid_post.1", "resid_pre.2"]) as both:
        model(ids)
    assert torch.equal(both["resid_post.1"], seen["before"] + 1.0 + 100.0)
    assert torch.equal(both["resid_pre.2"], both["resid_post.1"])


def test_an_exception_in_a_users_hook_or_an_edit_leaves_nothing_behind() -> None:
    model = tiny_model("llama")
    ids = tokens(model)
    clean = model(ids)

    def boom(*_: object) -> Tensor:
        raise ZeroDivisionError("boom")

    with pytest.raises(ZeroDivisionError), edited(model, Edit("gate.1", boom)), capture(model, "*", stop=False):
        model(ids)
    handle = model.layers[2].register_forward_pre_hook(boom)
    with pytest.raises(ZeroDivisionError), capture(model, "*", stop=False):
        model(ids)
    handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())
    assert model.hub.call is None and not model.hub.pending
    assert torch.equal(model(ids), clean)


@dataclass
class PaddedRight:
    """A token record whose last column is padding."""

    ids: Tensor
    mask: Tensor


def test_left_and_right_padding_give_the_real_tokens_the_same_values() -> None:
    model = tiny_model("llama")
    ids, pad = tokens(model, (1, 5)), torch.full((1, 3), 258)
    left, right = torch.cat([pad, ids], 1), torch.cat([ids, pad], 1)
    real = torch.arange(8) >= 3
    found = {}
    for name, given, mask, span in (("left", left, real, slice(3, 8)), ("right", right, real.flip(0), slice(0, 5))):
        with capture(model, ["resid_post.2", "neurons.1", "pattern.1", "logits"], stop=False) as acts:
            model(given, attention_mask=mask[None])
        found[name] = [acts[s][:, span] for s in ("resid_post.2", "neurons.1", "logits")]
        found[name].append(acts["pattern.1"][:, :, span, span])
    with capture(model, ["resid_post.2", "neurons.1", "pattern.1", "logits"], stop=False) as alone:
        model(ids)
    oracle = [alone[s] for s in ("resid_post.2", "neurons.1", "logits", "pattern.1")]
    for name, values in found.items():
        for value, expected in zip(values, oracle, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4, msg=name)
    with pytest.raises(InterpError, match="left padding"):
        model.generate(PaddedRight(right, real.flip(0)[None]), n_new=1)


class TiedGates(nn.Module):
    """Two modules hold one parameter; each multiplies its input by it."""

    class Gate(nn.Module):
        def __init__(self, alpha: nn.Parameter) -> None:
            super().__init__()
            self.alpha = alpha

        def forward(self, x: Tensor) -> Tensor:
            return x * self.alpha

    def __init__(self) -> None:
        super().__init__()
        alpha = nn.Parameter(torch.tensor(3.0))
        self.first, self.second = self.Gate(alpha), self.Gate(alpha)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_editing_one_use_of_a_tied_parameter_leaves_the_other_use_alone() -> None:
    net = TiedGates()
    undo = shadow(net.first, "alpha", lambda alpha: torch.full_like(alpha, 5.0))
    assert net(torch.tensor(1.0)).item() == 15.0
    undo()
    assert net(torch.tensor(1.0)).item() == 9.0 and net.first.alpha is net.second.alpha


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x, c: x[:, :1], r"resid_post\.1.*keep shape"),
        (lambda x, c: x.sum(), r"resid_post\.1.*keep shape"),
        (lambda x, c: x.half(), r"resid_post\.1.*float16.*keep shape, dtype and device"),
        (lambda x, c: x.to("meta"), r"resid_post\.1.*meta.*keep shape, dtype and device"),
        (lambda x, c: None, r"resid_post\.1 returned NoneType; return a tensor"),
        (lambda x, c: 0.0, r"resid_post\.1 returned float; return a tensor"),
    ],
    ids=["shape", "scalar", "dtype", "device", "nothing", "number"],
)
def test_an_edit_of_another_shape_dtype_or_device_is_refused(function: object, message: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(InterpError, match=message), edited(model, Edit("resid_post.1", function)):  # pyright: ignore
        model(tokens(model))


def test_a_capture_may_open_and_close_inside_an_edit_and_an_edit_inside_a_capture() -> None:
    model = tiny_model("llama")
    ids = tokens(model)
    with capture(model, "resid_post.1", stop=False) as clean:
        plain = model(ids)
    with edited(model, add("resid_post.1", 1.0)):
        with capture(model, "resid_post.1", stop=False) as inside:
            moved = model(ids)
        assert torch.equal(model(ids), moved)  # the edit outlives the capture
    with capture(model, "resid_post.1", stop=False) as outside:
        model(ids)
        with edited(model, add("resid_post.1", 1.0)):
            assert torch.equal(model(ids), moved)
        assert torch.equal(model(ids), plain)  # the capture outlives the edit
    base = clean["resid_post.1"]
    torch.testing.assert_close(inside["resid_post.1"], base + 1.0)
    expected = [base, inside["resid_post.1"], base]
    assert all(torch.equal(a, b) for a, b in zip(outside.calls("resid_post.1"), expected, strict=True))


def test_captures_may_close_in_any_order() -> None:
    model = tiny_model("llama")
    ids = tokens(model)
    first, second = capture(model, "gate.0"), capture(model, ["gate.0", "resid_post.2"])
    a, b = first.__enter__(), second.__enter__()
    model(ids)
    first.__exit__(None, None, None)
    model(ids)
    second.__exit__(None, None, None)
    assert len(a.calls("gate.0")) == 1 and len(b.calls("gate.0")) == 2 == len(b.calls("resid_post.2"))
    assert torch.equal(a["gate.0"], b.calls("gate.0")[1])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())


@pytest.mark.parametrize(
    "kept", [{"positions": []}, {"positions": torch.zeros(2, 7, dtype=torch.bool)}, {"scope": "new"}]
)
def test_a_capture_that_keeps_no_position_is_an_error(kept: dict[str, Any]) -> None:
    model = tiny_model("llama")
    with pytest.raises(NeverFiredError, match=r"no position of gate\.0"), capture(model, "gate.0", **kept):
        model(tokens(model))


@pytest.mark.parametrize("wrong", [True, [], [True]])
@pytest.mark.parametrize("where", ["head", "dims", "heads"])
def test_what_names_no_head_is_said(where: str, wrong: Any) -> None:
    model = tiny_model("llama")
    opened = capture(model, "z.0", heads=wrong) if where == "heads" else edited(model, zero("z.0", **{where: wrong}))
    with pytest.raises(InterpError, match="give an int or a list of ints"), opened:
        model(tokens(model))


def test_what_stands_for_the_logits_of_a_stopped_forward_cannot_be_indexed() -> None:
    model = tiny_model("llama")
    with capture(model, "gate.0"):
        answer = model(tokens(model))
    with pytest.raises(InterpError, match="stop=False"):
        answer[0]
