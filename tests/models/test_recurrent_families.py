"""Linear recurrences and gated attention: each layer stepped through in float64 from its captured gates.

Causal oracles: a closed forget gate cuts a layer off from earlier tokens; an open output gate lets everything through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from interp.core.errors import InterpError
from interp.core.sites import Part
from interp.instrument.capture import capture
from interp.instrument.edits import Edit, add, edited, set_to, zero
from interp.instrument.tokens import from_rows
from interp.models.family import ModuleCall
from interp.models.linear_fla import gated_norm, swiglu
from interp.models.model import LoadedModel
from interp.models.probe import probe_tokens
from interp.models.replays import untouched
from interp.models.tiny import tiny_model

RECURRENT = ("mamba", "mamba2", "recurrent-gemma", "qwen3-next", "rwkv", "xlstm")
CUT = 5
"""Position at which forget gates are closed."""


def seen(model: LoadedModel, *sites: str, edits: Sequence[Edit] = (), tokens: Tensor | None = None) -> list[Tensor]:
    scope = edited(model, list(edits)) if edits else nullcontext()
    with capture(model, list(sites), stop=False) as acts, scope:
        model(probe_tokens(model) if tokens is None else tokens)
    return [acts[site] for site in sites]


def mixer(model: LoadedModel, layer: int = 0) -> Any:
    block: Any = model.layers[layer]
    return next(
        getattr(block, name)
        for name in ("mixer", "temporal_block", "linear_attn", "attention", "mlstm_layer")
        if hasattr(block, name)
    )


def mamba_steps(model: LoadedModel) -> Tensor:
    names = ("mixer_in.0", "state_in.0", "state_out.0", "step_size.0", "decay.0", "output_gate.0")
    u, b, c, step, decay, gate = (x.double() for x in seen(model, *names))
    state, out = torch.zeros_like(decay[:, 0]), list[Tensor]()
    for t in range(u.shape[1]):
        state = decay[:, t] * state + (step[:, t] * u[:, t])[..., None] * b[:, t, None]
        out.append(((state * c[:, t, None]).sum(-1) + mixer(model).D.double() * u[:, t]) * gate[:, t])
    return torch.stack(out, dim=1)


def mamba2_steps(model: LoadedModel) -> Tensor:
    names = ("mixer_in.0", "state_in.0", "state_out.0", "step_size.0", "output_gate.0")
    x, b, c, step, gate = (value.double() for value in seen(model, *names))
    own = mixer(model)
    x = x.unflatten(-1, (own.num_heads, own.head_dim))
    per_group = own.num_heads // own.n_groups
    b, c = (value.unflatten(-1, (own.n_groups, -1)).repeat_interleave(per_group, dim=2) for value in (b, c))
    decay = torch.exp(-step * own.A_log.double().exp())
    state, out = x.new_zeros(*x[:, 0].shape, b.shape[-1]), list[Tensor]()
    for t in range(x.shape[1]):
        state = decay[:, t, :, None, None] * state
        state = state + (step[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        out.append((state * c[:, t, :, None]).sum(-1) + own.D.double()[:, None] * x[:, t])
    y = (torch.stack(out, dim=1).flatten(-2) * gate).unflatten(-1, (own.n_groups, -1))
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + own.norm.variance_epsilon)
    return y.flatten(-2) * own.norm.weight.double()


def lru_steps(model: LoadedModel) -> Tensor:
    names = ("mixer_in.0", "input_gate.0", "decay.0", "output_gate.0")
    x, enters, decay, gate = (value.double() for value in seen(model, *names))
    hidden, out = enters[:, 0] * x[:, 0], list[Tensor]()
    for t in range(x.shape[1]):
        if t:
            a = decay[:, t]
            hidden = a * hidden + (1 - a * a).sqrt() * enters[:, t] * x[:, t]
        out.append(hidden * gate[:, t])
    return torch.stack(out, dim=1)


def delta_steps(model: LoadedModel) -> Tensor:
    """S = (I - beta k k^T) e^g S + beta k v^T."""
    names = ("q.0", "k.0", "v.0", "write_gate.0", "log_decay.0", "output_gate.0")
    q, k, v, beta, log_decay, gate = (value.double() for value in seen(model, *names))
    own = mixer(model)
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    q, k = (x.repeat_interleave(v.shape[2] // k.shape[2], dim=2) for x in (q, k))
    state, out = v.new_zeros(len(v), v.shape[2], k.shape[-1], v.shape[-1]), list[Tensor]()
    for t in range(v.shape[1]):
        outer = k[:, t, :, :, None] * k[:, t, :, None]
        keep = torch.eye(k.shape[-1], dtype=k.dtype) - beta[:, t, :, None, None] * outer
        state = keep @ state * log_decay[:, t].exp()[..., None, None]
        state = state + beta[:, t, :, None, None] * k[:, t, :, :, None] * v[:, t, :, None]
        read = (q[:, t, :, None] @ state)[:, :, 0] / k.shape[-1] ** 0.5
        read = read * torch.rsqrt(read.square().mean(-1, keepdim=True) + own.norm.variance_epsilon)
        out.append(own.norm.weight.double() * read * gate[:, t])
    return torch.stack(out, dim=1).flatten(-2)


def rwkv_steps(model: LoadedModel) -> Tensor:
    """Numerator and denominator step by step, without the running maximum."""
    k, v, gate, w = (x.double() for x in seen(model, "k.0", "v.0", "receptance.0", "time_decay.0"))
    decay, first = torch.exp(-torch.exp(w)), mixer(model).time_first.double()
    above, below, out = torch.zeros_like(k[:, 0]), torch.zeros_like(k[:, 0]), list[Tensor]()
    for t in range(k.shape[1]):
        now = torch.exp(first + k[:, t])
        out.append(gate[:, t] * (above + now * v[:, t]) / (below + now))
        above = decay * above + k[:, t].exp() * v[:, t]
        below = decay * below + k[:, t].exp()
    return torch.stack(out, dim=1)


def mlstm_steps(model: LoadedModel) -> Tensor:
    """Gates exp(i) and sigmoid(f) as they are, not in logarithms."""
    names = ("q.0", "k.0", "v.0", "input_gate_pre.0", "forget_gate_pre.0", "output_gate.0")
    q, k, v, enters, keeps, gate = (x.double() for x in seen(model, *names))
    norm: Any = mixer(model).multihead_norm
    enters, keeps = enters.exp(), 1 / (1 + torch.exp(-keeps))
    state, mass = v.new_zeros(*k[:, 0].shape, v.shape[-1]), torch.zeros_like(k[:, 0])
    out = list[Tensor]()
    for t in range(v.shape[1]):
        written = enters[:, t, :, None] * k[:, t]
        state = keeps[:, t, :, None, None] * state + written[..., None] * v[:, t, :, None]
        mass = keeps[:, t, :, None] * mass + written
        query = q[:, t] / q.shape[-1] ** 0.5
        length = (mass * query).sum(-1, keepdim=True).abs().clamp_min(1)
        hidden = (query[:, :, None] @ state)[:, :, 0] / length
        out.append(F.layer_norm(hidden, hidden.shape[-1:], eps=norm.eps).flatten(-2) * norm.weight.double())
    return gate * torch.stack(out, dim=1)


STEPS: dict[str, Callable[[LoadedModel], Tensor]] = {
    "mamba": mamba_steps,
    "mamba2": mamba2_steps,
    "recurrent-gemma": lru_steps,
    "qwen3-next": delta_steps,
    "rwkv": rwkv_steps,
    "xlstm": mlstm_steps,
}


@pytest.mark.parametrize("name", RECURRENT)
def test_the_recurrence_step_by_step(name: str) -> None:
    model = tiny_model(name, n_layers=2)
    with torch.no_grad():
        expected = STEPS[name](model)
    (found,) = seen(model, "mixer_out.0")
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) < 3e-5 * float(expected.abs().max())


CLOSE: dict[str, tuple[tuple[str, ...], Edit]] = {
    "mamba": (("mixer_in.0",), zero("decay.0", at=[CUT])),
    "mamba2": (("mixer_in.0", "state_in.0"), set_to("step_size.0", 200.0, at=[CUT])),
    "recurrent-gemma": (("mixer_in.0",), zero("decay.0", at=[CUT])),
    "qwen3-next": (("k.0", "v.0"), set_to("log_decay.0", -100.0, at=[CUT])),
    "xlstm": (("k.0", "v.0"), set_to("forget_gate_pre.0", -100.0, at=[CUT])),
}
"""What enters the state, and the edit that empties it at `CUT`."""


@pytest.mark.parametrize("name", CLOSE)
def test_a_closed_gate_cuts_the_past_off(name: str) -> None:
    model = tiny_model(name, n_layers=2)
    enters, close = CLOSE[name]
    disturb = [add(site, 0.5, at=list(range(CUT))) for site in enters]
    (plain,), (moved,) = seen(model, "attn_out.0"), seen(model, "attn_out.0", edits=disturb)
    assert float((plain - moved)[:, CUT:].abs().max()) > 1e-3
    (cut,), (cut_moved,) = seen(model, "attn_out.0", edits=[close]), seen(model, "attn_out.0", edits=[*disturb, close])
    assert float((cut - cut_moved)[:, CUT:].abs().max()) < 1e-5
    assert torch.equal(cut_moved[:, :CUT], moved[:, :CUT])


def test_rwkv_without_memory_sees_one_token_back() -> None:
    """exp(-exp(20)) is 0; the token before enters before any decay."""
    model = tiny_model("rwkv", n_layers=2)
    forget = set_to("time_decay.0", 20.0)
    disturb = [add(site, 0.5, at=[CUT]) for site in ("k.0", "v.0")]
    (plain,), (moved,) = seen(model, "mixer_out.0"), seen(model, "mixer_out.0", edits=disturb)
    assert float((plain - moved)[:, CUT + 2 :].abs().max()) > 1e-4
    (plain,), (moved,) = (seen(model, "mixer_out.0", edits=[forget, *more]) for more in ([], disturb))
    assert torch.equal(plain[:, CUT + 2 :], moved[:, CUT + 2 :])
    assert float((plain - moved)[:, CUT + 1].abs().max()) > 1e-4


def test_the_two_receptances_of_rwkv() -> None:
    model = tiny_model("rwkv", n_layers=2)
    edits = [add("receptance_pre.1", -50.0), add("channel_receptance_pre.0", -50.0)]
    mixed, channel, untouched = seen(model, "mixer_out.1", "mlp_out.0", "mlp_out.1", edits=edits)
    assert float(mixed.abs().max()) < 1e-15 and float(channel.abs().max()) < 1e-15
    assert float(untouched.abs().max()) > 1e-2


def test_an_open_gate_lets_attention_through() -> None:
    """Adding 50 before the sigmoid makes `z` the ungated pattern @ v; without, `z` is that times the gate."""
    model = tiny_model("qwen3-next", n_layers=2)
    sites = ("pattern.1", "v.1", "attn_gate.1", "z.1")
    pattern, v, gate, z = seen(model, *sites)
    ungated = torch.einsum("bhqk,bkhd->bqhd", pattern, v.repeat_interleave(2, dim=2))
    assert torch.allclose(z, gate * ungated, atol=1e-6)
    assert float((z - ungated).abs().max()) > 1e-2
    _, _, gate, z = seen(model, *sites, edits=[add("attn_gate_pre.1", 50.0)])
    assert torch.equal(gate, torch.ones_like(gate))
    assert torch.allclose(z, ungated, atol=1e-6)


def test_an_output_gate_of_zero_silences_the_layer() -> None:
    for name in ("mamba", "mamba2", "recurrent-gemma", "qwen3-next", "xlstm"):
        model = tiny_model(name, n_layers=2)
        (out,) = seen(model, "mixer_out.0", edits=[zero("output_gate.0", at=[CUT])])
        assert not bool(out[:, CUT].any()), name
        assert bool(out[:, CUT + 1].all()), name


class TestPadding:
    ROWS = ((5, 9, 2, 40, 7, 11, 3), (8, 6, 30, 4))

    @pytest.mark.parametrize("name", ["mamba", "mamba2", "qwen3-next"])
    def test_padding_before_a_text_changes_nothing(self, name: str) -> None:
        model = tiny_model(name, n_layers=2)
        record = from_rows(model, self.ROWS, pad="left")
        logits = model(record)
        for row, ids in enumerate(self.ROWS):
            alone = model(torch.tensor([ids]))[0]
            assert torch.allclose(logits[row, -len(ids) :], alone, atol=1e-4), row

    @pytest.mark.parametrize("name", ["recurrent-gemma", "rwkv", "xlstm"])
    def test_padding_without_a_mask_is_refused_before_and_harmless_behind(self, name: str) -> None:
        model = tiny_model(name, n_layers=2)
        with pytest.raises(InterpError, match="no mask for padding"):
            model(from_rows(model, self.ROWS, pad="left"))
        logits = model(from_rows(model, self.ROWS, pad="right"))
        for row, ids in enumerate(self.ROWS):
            alone = model(torch.tensor([ids]))[0]
            assert torch.allclose(logits[row, : len(ids)], alone, atol=1e-4), row


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("n_prompt", [1, 6])
def test_no_state_is_left_from_one_call_to_the_next(name: str, n_prompt: int) -> None:
    """RecurrentGemma keeps its state in its modules: what came before must not show."""
    tokens, one = torch.arange(3, 3 + n_prompt)[None], torch.tensor([[7]])
    lru = {"lru_width": 32} if name == "recurrent-gemma" else {}  # of another width, transformers fails from one token
    model = tiny_model(name, n_layers=2, overrides=lru)
    fresh, fresh_one = (tiny_model(name, n_layers=2, overrides=lru)(ids) for ids in (tokens, one))
    first = model.generate(tokens, n_new=3)
    assert torch.equal(model(one), fresh_one)
    assert torch.equal(model.generate(tokens, n_new=3), first)
    assert torch.equal(model(tokens), fresh)
    assert torch.equal(model(one), fresh_one)


def test_a_fused_kernel_in_the_scan_s_place_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gates never exist as tensors; what is outside it still fires."""
    from transformers.models.mamba import modeling_mamba

    def fused(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x

    monkeypatch.setattr(modeling_mamba, "mamba_selective_scan", fused)
    model = tiny_model("mamba", n_layers=2)
    assert seen(model, "output_gate_pre.0")[0].shape[-1] == 64
    with pytest.raises(InterpError, match=r"step_size\.0"):
        seen(model, "step_size.0")


@pytest.mark.parametrize("activation", ["swish", "sigmoid"])
def test_the_fused_calls_of_flash_linear_attention_computed_again(activation: str) -> None:
    """Its gated norm and its MLP's product take their weights as arguments; a tap sees the gates between."""
    x, g, weight = torch.randn(3, 2, 5, 8, generator=torch.Generator().manual_seed(0)).unbind()
    norm: Any = torch.nn.RMSNorm(8, eps=1e-5)
    norm.activation = activation
    call = ModuleCall(module=norm, args=(x,), kwargs={"g": g}, output=None)
    expected = F.rms_norm(x, (8,), eps=1e-5) * g.sigmoid() * (g if activation == "swish" else 1)
    assert torch.allclose(gated_norm(call, untouched), expected, atol=1e-6)
    doubled = gated_norm(call, lambda part, value, **_: value * (2 if part is Part.OUTPUT_GATE else 1))
    assert torch.allclose(doubled, 2 * expected, atol=1e-6)
    call = ModuleCall(module=norm, args=(x, g, weight[0], None), kwargs={}, output=None)
    expected = (x * x.sigmoid() * g) @ weight[0].T
    assert torch.allclose(swiglu(call, untouched), expected, atol=1e-6)
    doubled = swiglu(call, lambda part, value, **_: value * {Part.GATE: 2, Part.NEURONS: 3}[part])
    assert torch.allclose(doubled, 6 * expected, atol=1e-5)
