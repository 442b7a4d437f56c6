"""Recurrent cells of torch: which gates did an LSTM, a GRU or a plain recurrent network set at every step?

    LSTM: i, f, o = sigmoid(W_ih x + b_ih + W_hh h + b_hh), g = tanh(same), c' = f c + i g, h' = W_hr (o tanh(c'))
    GRU:  r, z = sigmoid(same), n = tanh(W_in x + b_in + r (W_hn h + b_hn)), h' = (1 - z) n + z h
    RNN:  h' = tanh or relu(W_ih x + b_ih + W_hh h + b_hh)

(W_hr only with `proj_size`.) torch computes all steps in one fused call, of which no hook sees the inside; a replay
repeats it step by step from the module's weights. Values are (batch, time, width) whatever `batch_first` says, with a
batch of 1 where the input has none; positions (`at=`, `positions=`) are time steps, also backwards in time. Stacked
layers are the site's layer; the backward direction is a branch: `encoder:forget_gate.0`, `encoder@reverse:cell.1`.
Packed sequences keep the order of their rows; steps after a row's end hold 0, and an edit there changes nothing.

Cells (`nn.LSTMCell`) are called once a step by somebody's loop: each call is a firing of (batch, 1, width), its number
in the forward is its position. `at=-1` needs to know where the loop ends, so it is no position of a cell.

Source: the documentation of torch.nn.LSTM, GRU and RNN. Trap: dropout between layers is random, so a module that is
training with dropout cannot be replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from interp.core.errors import InterpError
from interp.core.sites import Part
from interp.models.family import Block, ModuleCall, Reach, Replay, Tap

Show = Callable[[Part, Tensor], Tensor]
"""A tap for one step of one layer: values are (batch, width)."""
State = tuple[Tensor, ...]
"""(hidden,), or (hidden, cell)."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One layer's weights in one direction."""

    input: Tensor
    hidden: Tensor
    input_bias: Tensor | None
    hidden_bias: Tensor | None
    projection: Tensor | None

    @staticmethod
    def of(module: nn.Module, suffix: str = "") -> Weights:
        """Those of a layer, whose names end in e.g. `_l0_reverse`; a cell's have no ending."""

        def find(name: str) -> Tensor | None:
            return cast("Tensor | None", getattr(module, name + suffix, None))

        return Weights(
            input=cast(Tensor, getattr(module, f"weight_ih{suffix}")),
            hidden=cast(Tensor, getattr(module, f"weight_hh{suffix}")),
            input_bias=find("bias_ih"),
            hidden_bias=find("bias_hh"),
            projection=find("weight_hr"),
        )


Step = Callable[[nn.Module, Weights, Tensor, State, Show], State]
"""One step: from `W_ih x + b_ih` and the state to the next state."""


def _lstm(_module: nn.Module, weights: Weights, given: Tensor, state: State, show: Show) -> State:
    hidden, cell = state
    raw = given + linear(hidden, weights.hidden, weights.hidden_bias)
    first, second, offered, last = raw.chunk(4, dim=-1)
    entering = show(Part.INPUT_GATE, torch.sigmoid(show(Part.INPUT_GATE_PRE, first)))
    kept = show(Part.FORGET_GATE, torch.sigmoid(show(Part.FORGET_GATE_PRE, second)))
    offered = show(Part.CELL_INPUT, torch.tanh(offered))
    cell = show(Part.CELL, kept * cell + entering * offered)
    leaving = show(Part.OUTPUT_GATE, torch.sigmoid(show(Part.OUTPUT_GATE_PRE, last)))
    hidden = leaving * torch.tanh(cell)
    hidden = hidden if weights.projection is None else linear(hidden, weights.projection)
    return show(Part.HIDDEN, hidden), cell


def _gru(_module: nn.Module, weights: Weights, given: Tensor, state: State, show: Show) -> State:
    (hidden,) = state
    reset_in, update_in, new_in = given.chunk(3, dim=-1)
    reset_past, update_past, new_past = linear(hidden, weights.hidden, weights.hidden_bias).chunk(3, dim=-1)
    reset = show(Part.RESET_GATE, torch.sigmoid(reset_in + reset_past))
    update = show(Part.UPDATE_GATE, torch.sigmoid(update_in + update_past))
    offered = show(Part.CELL_INPUT, torch.tanh(new_in + reset * new_past))
    return (show(Part.HIDDEN, (1 - update) * offered + update * hidden),)


def _rnn(module: nn.Module, weights: Weights, given: Tensor, state: State, show: Show) -> State:
    raw = given + linear(state[0], weights.hidden, weights.hidden_bias)
    return (show(Part.HIDDEN, torch.relu(raw) if getattr(module, "nonlinearity", "") == "relu" else torch.tanh(raw)),)


@dataclass(frozen=True, kw_only=True)
class _Sequence:
    """An input of a recurrent module as (batch, time, width), and the way back to its own form."""

    module: Any
    x: Tensor
    lengths: Tensor | None
    """Steps of each row, for packed sequences."""
    packed: PackedSequence | None
    batched: bool

    @staticmethod
    def of(module: Any, given: Tensor | PackedSequence) -> _Sequence:
        if isinstance(given, PackedSequence):
            x, lengths = pad_packed_sequence(given, batch_first=True)
            return _Sequence(module=module, x=x, lengths=lengths.to(x.device), packed=given, batched=True)
        batched = given.ndim == 3
        x = given if module.batch_first or not batched else given.transpose(0, 1)
        return _Sequence(module=module, x=x if batched else x[None], lengths=None, packed=None, batched=batched)

    def alive(self, step: int) -> Tensor | None:
        """Bool (batch, 1): rows that have this step; `None` if all do."""
        return None if self.lengths is None else (step < self.lengths)[:, None]

    def back(self, y: Tensor) -> Tensor | PackedSequence:
        """(batch, time, width) in the form of the input."""
        if self.packed is not None:
            order = self.packed.sorted_indices
            ordered = y if order is None else y.index_select(0, order)
            data = torch.cat([ordered[:n, step] for step, n in enumerate(self.packed.batch_sizes.tolist())])
            return PackedSequence(data, self.packed.batch_sizes, order, self.packed.unsorted_indices)
        if not self.batched:
            return y[0]
        return y if self.module.batch_first else y.transpose(0, 1)

    def start(self, given: Any, n_states: int) -> list[State]:
        """The first state of each layer and direction, each (batch, width)."""
        module, rows = self.module, len(self.x)
        n_runs = module.num_layers * (1 + module.bidirectional)
        if given is None:
            widths = (module.proj_size or module.hidden_size, module.hidden_size)[:n_states]
            return [tuple(self.x.new_zeros(rows, width) for width in widths)] * n_runs
        states = (given,) if isinstance(given, Tensor) else given
        return [tuple(state[run] if self.batched else state[run][None] for state in states) for run in range(n_runs)]


def _arguments(call: ModuleCall) -> tuple[Any, Any]:
    given = dict(zip(("input", "hx"), call.args, strict=False)) | dict(call.kwargs)
    return given["input"], given.get("hx")


def _stack(step: Step, n_states: int) -> Replay:
    """The replay of a module with layers and directions."""

    def replay(call: ModuleCall, tap: Tap) -> Any:
        module: Any = call.module
        if module.training and module.dropout > 0 and module.num_layers > 1:
            raise InterpError("a recurrent module that is training with dropout is random; call .eval() on it first")
        given, first = _arguments(call)
        sequence = _Sequence.of(module, given)
        starts, ends, x = sequence.start(first, n_states), [], sequence.x
        for layer in range(module.num_layers):
            outputs: list[Tensor] = []
            for branch in ("", "reverse")[: 1 + module.bidirectional]:
                y, end = _run(step, sequence, x, starts[len(ends)], (layer, branch), tap)
                outputs.append(y)
                ends.append(end)
            x = torch.cat(outputs, dim=-1)
        final = [torch.stack(states) for states in zip(*ends, strict=True)]
        final = final if sequence.batched else [state[:, 0] for state in final]
        return sequence.back(x), (tuple(final) if n_states == 2 else final[0])

    return replay


def _run(
    step: Step, sequence: _Sequence, x: Tensor, state: State, where: tuple[int, str], tap: Tap
) -> tuple[Tensor, State]:
    """All steps of one layer in one direction: the hidden states, and the last state."""
    layer, branch = where
    weights = Weights.of(sequence.module, f"_l{layer}_{branch}" if branch else f"_l{layer}")
    n_steps = x.shape[1]
    given = linear(x, weights.input, weights.input_bias)
    hidden: list[Tensor] = [x] * n_steps
    for now in reversed(range(n_steps)) if branch else range(n_steps):
        alive = sequence.alive(now)

        def show(part: Part, value: Tensor, now: int = now, alive: Tensor | None = alive) -> Tensor:
            value = value if alive is None else torch.where(alive, value, 0)
            return tap(part, value[:, None], layer=layer, branch=branch, step=now, n_steps=n_steps)[:, 0]

        new = step(sequence.module, weights, given[:, now], state, show)
        if alive is not None:
            new = tuple(torch.where(alive, after, before) for after, before in zip(new, state, strict=True))
        state = new
        hidden[now] = state[0]
    return torch.stack(hidden, dim=1), state


def _cell(step: Step, n_states: int) -> Replay:
    """The replay of a cell, which computes one step."""

    def replay(call: ModuleCall, tap: Tap) -> Any:
        module: Any = call.module
        x, given = _arguments(call)
        batched = x.ndim == 2
        x = x if batched else x[None]
        states = (given,) if isinstance(given, Tensor) else given
        if states is None:
            state = (x.new_zeros(len(x), module.hidden_size),) * n_states
        else:
            state = tuple(state if batched else state[None] for state in states)
        weights = Weights.of(module)

        def show(part: Part, value: Tensor) -> Tensor:
            return tap(part, value[:, None], step=call.number)[:, 0]

        new = step(module, weights, linear(x, weights.input, weights.input_bias), state, show)
        new = new if batched else tuple(state[0] for state in new)
        return new if n_states == 2 else new[0]

    return replay


GATES = {
    "LSTM": (
        Part.INPUT_GATE_PRE, Part.INPUT_GATE, Part.FORGET_GATE_PRE, Part.FORGET_GATE, Part.CELL_INPUT, Part.CELL,
        Part.OUTPUT_GATE_PRE, Part.OUTPUT_GATE, Part.HIDDEN,
    ),
    "GRU": (Part.RESET_GATE, Part.UPDATE_GATE, Part.CELL_INPUT, Part.HIDDEN),
    "RNN": (Part.HIDDEN,),
}  # fmt: skip


def _block(name: str, classes: tuple[str, ...], replay: Replay, *, stacked: bool) -> Block:
    kind = name.removesuffix("Cell").upper()
    return Block(
        name=name,
        classes=classes,
        has=("weight_ih_l0", "weight_hh_l0") if stacked else ("weight_ih", "weight_hh"),
        parts={part: Reach(path="", side="replay", replay=replay) for part in GATES[kind]},
        layers=_n_layers if stacked else None,
        branches=_directions if stacked else None,
    )


def _n_layers(module: nn.Module) -> int:
    return int(cast(Any, module).num_layers)


def _directions(module: nn.Module) -> tuple[str, ...]:
    return ("reverse",) if cast(Any, module).bidirectional else ()


BLOCKS: tuple[Block, ...] = (
    _block("LSTM", ("LSTM",), _stack(_lstm, 2), stacked=True),
    _block("GRU", ("GRU",), _stack(_gru, 1), stacked=True),
    _block("RNN", ("RNN",), _stack(_rnn, 1), stacked=True),
    _block("LSTMCell", ("LSTMCell",), _cell(_lstm, 2), stacked=False),
    _block("GRUCell", ("GRUCell",), _cell(_gru, 1), stacked=False),
    _block("RNNCell", ("RNNCell",), _cell(_rnn, 1), stacked=False),
)
