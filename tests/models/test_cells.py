"""Recurrent cells: gates equal a float64 loop written by hand, outputs the library's own, edits act inside the loop."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

from interp.core.errors import InterpError, NeverFiredError
from interp.core.seed import torch_generator
from interp.core.sites import Part, Site
from interp.instrument.capture import capture
from interp.instrument.edits import add, edited, last, scale, set_to, zero
from interp.models.blocks import known_blocks
from interp.models.family import ModuleCall
from interp.models.model import LoadedModel
from interp.models.probe import verify
from interp.models.replays import untouched
from tests.models.networks import noise

D_IN, D_HIDDEN, STEPS, ROWS = 5, 6, 7, 3
LENGTHS = (4, 7, 2)


def recurrent(
    kind: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, std: float = 0.6, **options: Any
) -> nn.Module:
    """An nn.LSTM, nn.GRU, ... with weights that make every gate move."""
    module = getattr(nn, kind)(D_IN, D_HIDDEN, **options)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch_generator(seed, name)) * std)
    return module.to(dtype).eval()


class Reader(nn.Module):
    """A recurrent encoder and a head; the input's axes are the encoder's."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, 2)
        with torch.no_grad():
            for name, parameter in self.head.named_parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch_generator(9, name)))
        self.head.to(next(encoder.parameters()).dtype)

    def forward(self, x: Tensor | PackedSequence) -> Tensor:
        out = self.encoder(x)[0]
        return self.head(out.data if isinstance(out, PackedSequence) else out)


class Looped(nn.Module):
    """A cell in a loop over (batch, time, width)."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state, seen = None, []
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
            seen.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(seen, dim=1)


def model_of(kind: str, **options: Any) -> LoadedModel:
    if kind.endswith("Cell"):
        return LoadedModel(Looped(recurrent(kind, **options)))
    encoder = recurrent(kind, **options)
    width = (options.get("proj_size") or D_HIDDEN) * (2 if options.get("bidirectional") else 1)
    return LoadedModel(Reader(encoder, width))


# An independent restatement, row by row of the weights, in float64.


def by_hand(
    kind: str, weights: dict[str, Tensor], x: Tensor, *, suffix: str = "", backwards: bool = False, **override: Tensor
) -> dict[str, Tensor]:
    """One layer over (time, width) of one row: every gate at every step. `override` replaces a gate (time, width)."""
    w_in, w_past = weights[f"weight_ih{suffix}"].double(), weights[f"weight_hh{suffix}"].double()
    b_in = weights.get(f"bias_ih{suffix}", torch.zeros(len(w_in))).double()
    b_past = weights.get(f"bias_hh{suffix}", torch.zeros(len(w_past))).double()
    project = weights.get(f"weight_hr{suffix}")
    n = D_HIDDEN
    h = torch.zeros(w_past.shape[1], dtype=torch.float64)
    c = torch.zeros(n, dtype=torch.float64)
    steps: list[dict[str, Tensor]] = []
    order = range(len(x) - 1, -1, -1) if backwards else range(len(x))
    for t in order:
        row: dict[str, Tensor] = {}

        def gate(name: str, value: Tensor, t: int = t, row: dict[str, Tensor] = row) -> Tensor:
            row[name] = override[name][t] if name in override else value
            return row[name]

        a, b = w_in @ x[t].double() + b_in, w_past @ h + b_past
        if kind.startswith("LSTM"):
            i = gate("input_gate", 1 / (1 + torch.exp(-(a + b)[:n])))
            f = gate("forget_gate", 1 / (1 + torch.exp(-(a + b)[n : 2 * n])))
            g = gate("cell_input", torch.tanh((a + b)[2 * n : 3 * n]))
            o = gate("output_gate", 1 / (1 + torch.exp(-(a + b)[3 * n :])))
            c = gate("cell", f * c + i * g)
            h = o * torch.tanh(c)
            h = gate("hidden", h if project is None else project.double() @ h)
        elif kind.startswith("GRU"):
            r = gate("reset_gate", 1 / (1 + torch.exp(-(a + b)[:n])))
            z = gate("update_gate", 1 / (1 + torch.exp(-(a + b)[n : 2 * n])))
            new = gate("cell_input", torch.tanh(a[2 * n :] + r * b[2 * n :]))
            h = gate("hidden", (1 - z) * new + z * h)
        else:
            h = gate("hidden", torch.tanh(a + b))
        steps.append(row)
    steps = steps[::-1] if backwards else steps
    return {name: torch.stack([row[name] for row in steps]) for name in steps[0]}


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_gates_equal_a_loop_by_hand_in_both_directions_and_layers(kind: str) -> None:
    model = model_of(kind, num_layers=2, bidirectional=True, batch_first=True)
    x = noise(ROWS, STEPS, D_IN)
    with capture(model, ["*:*"], stop=False) as acts:
        out = model(x)
    assert torch.equal(out, model.module(x))
    weights = dict(model.module.encoder.named_parameters())
    below = x.double()
    for layer in (0, 1):
        outputs = []
        for branch in ("", "reverse"):
            suffix = f"_l{layer}_{branch}" if branch else f"_l{layer}"
            backwards = bool(branch)
            wanted = [by_hand(kind, weights, row, suffix=suffix, backwards=backwards) for row in below]
            path = f"encoder@{branch}" if branch else "encoder"
            for name in wanted[0]:
                seen = acts[f"{path}:{name}.{layer}"]
                assert torch.allclose(seen.double(), torch.stack([row[name] for row in wanted]), atol=1e-6), (
                    name,
                    path,
                )
            outputs.append(torch.stack([row["hidden"] for row in wanted]))
        below = torch.cat(outputs, dim=-1)


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_a_cell_in_a_loop_fires_once_a_step(kind: str) -> None:
    model = model_of(kind)
    x = noise(ROWS, STEPS, D_IN)
    with capture(model, ["cell:*"], stop=False) as acts:
        out = model(x)
    assert torch.equal(out, model.module(x))
    wanted = [by_hand(kind, dict(model.module.cell.named_parameters()), row) for row in x]
    for name in wanted[0]:
        seen = torch.cat(acts.calls(f"cell:{name}"), dim=1)
        assert len(acts.calls(f"cell:{name}")) == STEPS
        assert torch.allclose(seen.double(), torch.stack([row[name] for row in wanted]), atol=1e-6)


def _form(name: str, *, batch_first: bool) -> Tensor | PackedSequence:
    if name == "batch":
        return noise(ROWS, STEPS, D_IN) if batch_first else noise(STEPS, ROWS, D_IN)
    if name == "single":
        return noise(STEPS, D_IN)
    rows = [noise(n, D_IN, seed=n) for n in (sorted(LENGTHS, reverse=True) if name == "packed in order" else LENGTHS)]
    return pack_sequence(rows, enforce_sorted=name == "packed in order")


def _flat(output: Any) -> list[Tensor]:
    if isinstance(output, PackedSequence):
        return [output.data]
    return [output] if isinstance(output, Tensor) else [tensor for item in output for tensor in _flat(item)]


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("form", ["batch", "single", "packed", "packed in order"])
def test_the_replay_returns_what_the_library_returns(kind: str, form: str) -> None:
    """Every combination of layers, directions, order of axes, bias, projection and initial state."""
    reach = next(iter(known_blocks()[kind][0].parts.values()))
    assert reach.replay is not None
    for layers, both, first, bias, projected, given in itertools.product((1, 2), *[(False, True)] * 5):
        if projected and kind != "LSTM":
            continue
        options = {"num_layers": layers, "bidirectional": both, "batch_first": first, "bias": bias}
        more = ({"proj_size": 4} if projected else {}) | ({"dropout": 0.5} if layers > 1 else {})
        module = recurrent(kind, std=0.3, **options, **more)  # not so large that rounding grows from step to step
        x = _form(form, batch_first=first)
        rows = () if form == "single" else (ROWS,)
        # Hidden states lie between -1 and 1.
        states = [noise(layers * (1 + both), *rows, 4 if projected else D_HIDDEN, seed=4).tanh()]
        states += [noise(layers * (1 + both), *rows, D_HIDDEN, seed=5)] if kind == "LSTM" else []
        start = (tuple(states) if kind == "LSTM" else states[0]) if given else None
        with torch.no_grad():
            own = module(x, start)
            again = reach.replay(ModuleCall(module=module, args=(x,), kwargs={"hx": start}, output=own), untouched)
        for one, other in zip(_flat(own), _flat(again), strict=True):
            assert one.shape == other.shape
            assert float((one - other).abs().max()) < 1e-6, (options, more, given)


@pytest.mark.parametrize("batch_first", [True, False])
def test_an_edit_at_one_step_moves_this_step_and_all_later_ones(batch_first: bool) -> None:
    model = model_of("LSTM", batch_first=batch_first)
    x = _form("batch", batch_first=batch_first)
    plain = model(x)
    with edited(model, [add("encoder:input_gate.0", 0.5, at=3)]) as receipts:
        moved = model(x) - plain
    by_step = moved.abs().amax(dim=(0, 2) if batch_first else (1, 2))
    assert torch.equal(by_step[:3], torch.zeros(3)) and bool((by_step[3:] > 1e-4).all())
    assert receipts[0].n_tokens == ROWS
    with edited(model, [add("encoder:input_gate.0", 0.5, at=-1)]):
        by_step = (model(x) - plain).abs().amax(dim=(0, 2) if batch_first else (1, 2))
    assert torch.equal(by_step[:-1], torch.zeros(STEPS - 1)) and float(by_step[-1]) > 1e-4
    with edited(model, [add("encoder:input_gate.0", 0.5, at=last)]):
        assert torch.equal((model(x) - plain).abs().amax(dim=(0, 2) if batch_first else (1, 2)), by_step)


def test_backwards_in_time_an_edit_moves_earlier_steps() -> None:
    model = model_of("GRU", bidirectional=True, batch_first=True)
    x = noise(ROWS, STEPS, D_IN)
    plain = model(x)
    with edited(model, [add("encoder@reverse:update_gate.0", 0.5, at=3)]):
        by_step = (model(x) - plain).abs().amax(dim=(0, 2))
    assert bool((by_step[:4] > 1e-4).all()) and torch.equal(by_step[4:], torch.zeros(STEPS - 4))


@pytest.mark.parametrize("at", [0, 4])
def test_one_row_and_unit_of_a_gate_equals_the_loop_with_that_gate(at: int) -> None:
    """An edited replay against the loop by hand with the same gate replaced."""
    model = model_of("LSTM", batch_first=True)
    x = noise(ROWS, STEPS, D_IN)
    weights = dict(model.module.encoder.named_parameters())
    plain = by_hand("LSTM", weights, x[1], suffix="_l0")
    gate = plain["forget_gate"].clone()
    gate[at, 2] = 0.9
    chosen = torch.zeros(ROWS, STEPS, dtype=torch.bool)
    chosen[1, at] = True
    with edited(model, [set_to("encoder:forget_gate.0", 0.9, at=chosen, dims=2)]), capture(model, ["encoder"]) as acts:
        model(x)
    # Later gates follow the edit, so only the edited step is replaced: loop again up to it, then freely on.
    wanted = by_hand_with_step(weights, x[1], at, gate[at])
    assert torch.allclose(acts["encoder"][1].double(), wanted, atol=1e-6)
    with capture(model, ["encoder"]) as before:
        model(x)
    assert torch.equal(acts["encoder"][[0, 2]], before["encoder"][[0, 2]])


def by_hand_with_step(weights: dict[str, Tensor], x: Tensor, at: int, gate: Tensor) -> Tensor:
    """Hidden states with the forget gate replaced at one step only."""
    w_in, w_past, b_in, b_past = (
        weights[f"{name}_l0"].double() for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    h, c, seen = torch.zeros(D_HIDDEN).double(), torch.zeros(D_HIDDEN).double(), []
    for t, given in enumerate(x.double()):
        i, f, g, o = (w_in @ given + b_in + w_past @ h + b_past).view(4, D_HIDDEN)
        c = (gate if t == at else f.sigmoid()) * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        seen.append(h)
    return torch.stack(seen)


def test_a_closed_forget_gate_and_hidden_state_cut_off_the_past() -> None:
    """forget_gate 0 at step t, and nothing of h before it: outputs from t on do not depend on inputs before t."""
    model = model_of("LSTM", batch_first=True)
    x = noise(ROWS, STEPS, D_IN)
    other = x.clone()
    other[:, :3] = noise(ROWS, 3, D_IN, seed=8)
    cut = [zero("encoder:forget_gate.0", at=3), zero("encoder:hidden.0", at=2)]
    with edited(model, cut):
        one, two = model(x), model(other)
    assert torch.equal(one[:, 3:], two[:, 3:])
    assert not torch.allclose(one[:, :2], two[:, :2], atol=1e-2)
    with edited(model, cut[1:]):
        assert not torch.allclose(model(x)[:, 3:], model(other)[:, 3:], atol=1e-4)


def test_the_forget_gate_alone_cuts_off_a_cell_whose_gates_ignore_the_past() -> None:
    model = model_of("LSTM", batch_first=True)
    with torch.no_grad():
        model.module.encoder.weight_hh_l0.zero_()
    x = noise(ROWS, STEPS, D_IN)
    other = x.clone()
    other[:, :3] = noise(ROWS, 3, D_IN, seed=8)
    with edited(model, [zero("encoder:forget_gate.0", at=3)]):
        one, two = model(x), model(other)
    assert torch.equal(one[:, 3:], two[:, 3:])
    assert not torch.allclose(model(x)[:, 3:], model(other)[:, 3:], atol=1e-4)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_gradients_of_gates_equal_autograd_through_the_loop(kind: str) -> None:
    model = LoadedModel(Reader(recurrent(kind, dtype=torch.float64, batch_first=True), D_HIDDEN))
    x = noise(1, STEPS, D_IN, dtype=torch.float64)
    names = {"LSTM": ("input_gate", "forget_gate", "cell_input", "output_gate", "cell", "hidden"),
             "GRU": ("reset_gate", "update_gate", "cell_input", "hidden")}[kind]  # fmt: skip
    with capture(model, [f"encoder:{name}.0" for name in names], grad=True) as acts:
        model(x).square().sum().backward()
    weights = dict(model.module.encoder.named_parameters())
    head = model.module.head
    for name in names:
        probe = torch.zeros(STEPS, D_HIDDEN, dtype=torch.float64, requires_grad=True)
        loss = head(_probed(kind, weights, x[0], name, probe)).square().sum()
        (wanted,) = torch.autograd.grad(loss, probe)
        assert torch.allclose(acts.grad(f"encoder:{name}.0")[0], wanted, atol=1e-10), name
        assert float(wanted.abs().max()) > 1e-4


def _probed(kind: str, weights: dict[str, Tensor], x: Tensor, name: str, probe: Tensor) -> Tensor:
    """Hidden states of the loop with a probe added to one gate at every step."""
    w_in, w_past, b_in, b_past = (weights[f"{part}_l0"] for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    h = c = torch.zeros(D_HIDDEN, dtype=torch.float64)
    seen = []
    for t, given in enumerate(x):

        def bump(what: str, value: Tensor, t: int = t) -> Tensor:
            return value + probe[t] if what == name else value

        a, b = w_in @ given + b_in, w_past @ h + b_past
        if kind == "LSTM":
            i, f, g, o = (a + b).chunk(4)
            c = bump("forget_gate", f.sigmoid()) * c + bump("input_gate", i.sigmoid()) * bump("cell_input", g.tanh())
            c = bump("cell", c)
            h = bump("hidden", bump("output_gate", o.sigmoid()) * c.tanh())
        else:
            (r, z, n), (br, bz, bn) = a.chunk(3), b.chunk(3)
            z = bump("update_gate", (z + bz).sigmoid())
            n = bump("cell_input", torch.tanh(n + bump("reset_gate", (r + br).sigmoid()) * bn))
            h = bump("hidden", (1 - z) * n + z * h)
        seen.append(h)
    return torch.stack(seen)


def test_gradients_reach_the_input_as_without_a_capture() -> None:
    model = model_of("LSTM", num_layers=2, bidirectional=True)
    x, y = noise(STEPS, ROWS, D_IN).requires_grad_(), noise(STEPS, ROWS, D_IN).requires_grad_()
    model.module(x).square().sum().backward()
    with capture(model, ["encoder:cell.1"], grad=True):
        out = model(y)
        out.square().sum().backward()
    assert torch.equal(out, model.module(x))
    assert torch.allclose(x.grad, y.grad, atol=1e-5)


def test_packed_sequences_keep_their_rows_and_hold_zero_after_their_end() -> None:
    model = model_of("LSTM", bidirectional=True)
    packed = _form("packed", batch_first=True)
    padded, _ = pad_packed_sequence(packed, batch_first=True)
    with capture(model, ["*:*"], stop=False) as acts:
        out = model(packed)
    assert torch.equal(out, model.module(packed))
    weights = dict(model.module.encoder.named_parameters())
    for row, length in enumerate(LENGTHS):
        for path, suffix in (("encoder", "_l0"), ("encoder@reverse", "_l0_reverse")):
            wanted = by_hand("LSTM", weights, padded[row, :length], suffix=suffix, backwards="reverse" in path)
            for name, value in wanted.items():
                seen = acts[f"{path}:{name}.0"]
                assert torch.allclose(seen[row, :length].double(), value, atol=1e-6), (name, path)
                assert seen.shape[1] == max(LENGTHS) and float(seen[row, length:].abs().sum()) == 0


def test_an_edit_of_a_packed_sequence_stays_in_its_row() -> None:
    model = model_of("GRU")
    packed = _form("packed", batch_first=True)
    chosen = torch.zeros(3, 7, dtype=torch.bool)
    chosen[0, 1] = chosen[2, 5] = True  # row 2 has only two steps
    plain = model.module.encoder(packed)[0]
    with capture(model, ["head@input"]) as acts, edited(model, [add("encoder:hidden.0", 1.0, at=chosen)]):
        model(packed)
    moved, lengths = pad_packed_sequence(
        plain._replace(data=(acts["head@input"] - plain.data.detach()).abs()), batch_first=True
    )
    by_step = moved.amax(dim=-1)
    assert torch.equal(lengths, torch.tensor(LENGTHS))
    assert float(by_step[1:].max()) == 0 and float(by_step[0, 0]) == 0 and bool((by_step[0, 1:4] > 1e-3).all())


def test_packing_with_enforced_order_and_padding_agree() -> None:
    """The same rows padded and packed give the same gates."""
    model = model_of("GRU")
    rows = [noise(n, D_IN, seed=n) for n in LENGTHS]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    one = pack_sequence(rows, enforce_sorted=False)
    two = pack_padded_sequence(padded, torch.tensor(LENGTHS), batch_first=True, enforce_sorted=False)
    values = []
    for packed in (one, two):
        with capture(model, ["encoder:reset_gate.0"]) as acts:
            model(packed)
        values.append(acts["encoder:reset_gate.0"])
    assert torch.equal(values[0], values[1]) and values[0].shape == (3, 7, D_HIDDEN)


def test_positions_of_a_capture_are_time_steps() -> None:
    model = model_of("LSTM")
    x = noise(STEPS, ROWS, D_IN)
    with capture(model, ["encoder:cell.0"]) as every:
        model(x)
    with capture(model, ["encoder:cell.0"], positions=[1, -1]) as some:
        model(x)
    assert torch.equal(some["encoder:cell.0"], every["encoder:cell.0"][:, [1, 6]])
    with pytest.raises(InterpError, match="positions 0 to 6"), capture(model, ["encoder:cell.0"], positions=7):
        model(x)


def test_steps_of_a_cell_in_a_loop() -> None:
    model = model_of("LSTMCell")
    x = noise(ROWS, STEPS, D_IN)
    plain = model(x)
    with edited(model, [scale("cell:forget_gate", 0.0, at=[2])]) as receipts:
        by_step = (model(x) - plain).abs().amax(dim=(0, 2))
    assert torch.equal(by_step[:2], torch.zeros(2)) and bool((by_step[2:] > 1e-4).all())
    assert receipts[0].n_tokens == ROWS
    with pytest.raises(NeverFiredError, match="touched no token"), edited(model, [zero("cell:cell", at=-1)]):
        model(x)


CASES = {
    "LSTM": ("LSTM", {}, (3, 2, D_IN)),
    "GRU": ("GRU", {"batch_first": True, "bidirectional": True}, (2, 3, D_IN)),
    "RNN": ("RNN", {"nonlinearity": "relu"}, (4, 2, D_IN)),
    "LSTM with a projection": ("LSTM", {"proj_size": 3}, (4, 2, D_IN)),
    "LSTM of one row": ("LSTM", {"bias": False}, (4, D_IN)),
    "LSTMCell": ("LSTMCell", {}, (2, 3, D_IN)),
    "GRUCell": ("GRUCell", {}, (2, 3, D_IN)),
    "RNNCell": ("RNNCell", {}, (2, 3, D_IN)),
}


def opened(name: str, dtype: torch.dtype = torch.float32) -> tuple[LoadedModel, Tensor]:
    """A network around the cell and its input; `test_families` captures, edits and differentiates these."""
    kind, options, shape = CASES[name]
    return model_of(kind, dtype=dtype, **options), noise(*shape, dtype=dtype)


def test_a_recurrent_module_by_itself_and_its_names() -> None:
    model = LoadedModel(recurrent("LSTM", bidirectional=True, num_layers=2))
    assert verify(model, noise(2, 1, D_IN)).passed
    assert Site(Part.CELL, 1, path="@reverse") in model.sites()
    assert [str(site) for site in model.resolve("*:forget_gate.*")] == [
        ":forget_gate.0", ":forget_gate.1", "@reverse:forget_gate.0", "@reverse:forget_gate.1",
    ]  # fmt: skip
    reader = model_of("GRU", num_layers=2)
    with pytest.raises(InterpError, match="layers with encoder:update_gate: 0-1"):
        reader.resolve("encoder:update_gate.2")
    with pytest.raises(InterpError, match="encoder:reset_gate.0"):
        reader.resolve("encoder:rest_gate.0")


def test_training_with_dropout_is_refused() -> None:
    model = model_of("LSTM", num_layers=2, dropout=0.5)
    model.module.train()
    with pytest.raises(InterpError, match="eval"), capture(model, ["encoder:cell.0"]):
        model(noise(STEPS, ROWS, D_IN))
    model.module.eval()
    with capture(model, ["encoder:cell.0"]):
        model(noise(STEPS, ROWS, D_IN))


def test_the_probe_notices_a_cell_of_another_kind() -> None:
    """A class that computes something else under a known name."""

    class LSTM(nn.LSTM):
        def forward(self, input: Tensor, hx: Any = None) -> Any:
            return super().forward(input * 2, hx)

    model = LoadedModel(LSTM(D_IN, D_HIDDEN).eval())
    failure = verify(model, noise(STEPS, ROWS, D_IN)).first_failure
    assert failure is not None and failure.name == "the replay returns what the module returned"
