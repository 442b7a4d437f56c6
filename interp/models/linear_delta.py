"""Gated DeltaNet: where its gates are, in whatever model of transformers it stands.

Per value head, with keys and queries made length 1 (queries also divided by sqrt(d)):

    q, k, v = silu(conv(conv_in));  beta = sigmoid(b);  g = -exp(A_log) softplus(a + dt_bias)
    S' = e^g S;  S = S' + k beta (v - S'^T k)^T;  readout = S^T q;  mixer_out = norm(readout) * silu(z)

The places are those of transformers' own code (Qwen3NextGatedDeltaNet, 5.23), in a whole forward and in a step of
decoding alike: results of view, cat, transpose, sigmoid and add, counted within the module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from interp.core.sites import Part
from interp.models.family import Reach, Rule, View
from interp.models.linear_views import CHANNELS_FIRST, piece

GATES = ("batch", "pos", "value_head")
VALUES = ("batch", "pos", "value_head", "d_value")
KEYS = ("batch", "pos", "key_head", "d_key")


def _widths(mixer: Any) -> tuple[int, int, int]:
    return mixer.key_dim, mixer.key_dim, mixer.value_dim


def _key(mixer: Any) -> int:
    return mixer.head_k_dim


def _value(mixer: Any) -> int:
    return mixer.head_v_dim


def _group_qkvz(mixer: Any) -> list[int]:
    wide = mixer.num_v_heads // mixer.num_k_heads * mixer.head_v_dim
    return [mixer.head_k_dim, mixer.head_k_dim, wide, wide]


def _group_ba(mixer: Any) -> list[int]:
    return [mixer.num_v_heads // mixer.num_k_heads] * 2


def grouped(sizes: Callable[[Any], list[int]], number: int, n_axes: int) -> View:
    """One piece of each key head's part (batch, pos, key_head, ...), as (batch, pos, value_head[, d_value]).

    The fused tensor is written, not a copy of the piece: rounding depends on how a tensor lies in memory.
    """

    def read(mixer: Any, x: Tensor) -> Tensor:
        found = x.split(sizes(mixer), dim=-1)[number]
        return found.flatten(2) if n_axes == 2 else found.reshape(*x.shape[:2], mixer.num_v_heads, mixer.head_v_dim)

    def write(mixer: Any, x: Tensor, new: Tensor) -> Tensor:
        pieces = list(x.split(sizes(mixer), dim=-1))
        pieces[number] = new.reshape(pieces[number].shape)
        return torch.cat(pieces, dim=-1)

    return View(read=read, write=write)


def delta_parts(path: str) -> dict[Part, Reach]:
    """Sites of a gated DeltaNet at this path."""

    def convolved(number: int, width: Callable[[Any], int], axes: tuple[str, ...]) -> Reach:
        view = piece(_widths, number, width)
        return Reach(path=path, side="op", op="transpose", nth=1, view=view, axes=axes)

    def of_norm(**more: Any) -> Reach:
        return Reach(path=f"{path}.norm", flat=True, folded="value_head", axes=VALUES, **more)

    return {
        Part.CONV_IN: Reach(path=path, side="op", op="cat", axes=("batch", "pos", "d_conv")),
        Part.Q: convolved(0, _key, KEYS),
        Part.K: convolved(1, _key, KEYS),
        Part.V: convolved(2, _value, VALUES),
        Part.WRITE_GATE_PRE: Reach(path=path, side="op", op="view", nth=1, view=grouped(_group_ba, 0, 2), axes=GATES),
        Part.WRITE_GATE: Reach(path=path, side="op", op="sigmoid", axes=GATES),
        Part.DECAY_PRE: Reach(path=path, side="op", op="add", axes=GATES),
        Part.LOG_DECAY: Reach(path=path, side="op", op="transpose", nth=6, view=CHANNELS_FIRST, axes=GATES),
        Part.READOUT: of_norm(side="input"),
        Part.OUTPUT_GATE_PRE: Reach(path=path, side="op", op="view", view=grouped(_group_qkvz, 3, 3), axes=VALUES),
        Part.OUTPUT_GATE: of_norm(side="op", op="silu"),
        Part.MIXER_OUT: Reach(path=f"{path}.out_proj", side="input"),
    }


def delta_sizes(path: str) -> dict[str, str]:
    names = {
        "key_head": "num_k_heads",
        "value_head": "num_v_heads",
        "d_key": "head_k_dim",
        "d_value": "head_v_dim",
        "d_conv": "conv_dim",
        "d_inner": "value_dim",
    }
    return {axis: f"{path}.{name}" for axis, name in names.items()}


def _rows(mixer: Any, name: str) -> list[Tensor]:
    """The fused weight's rows by meaning: for each key head its queries, keys, values and gates (or b and a)."""
    sizes = _group_qkvz(mixer) if name == "in_proj_qkvz" else _group_ba(mixer)
    pieces = getattr(mixer, name).weight.unflatten(0, (mixer.num_k_heads, -1)).split(sizes, dim=1)
    return [found.flatten(0, 1) for found in pieces]


def _conv_in(layer: Any, x: Tensor) -> Tensor:
    return torch.cat([x @ rows.T for rows in _rows(layer.linear_attn, "in_proj_qkvz")[:3]], dim=-1)


def _gate(layer: Any, x: Tensor) -> Tensor:
    return (x @ _rows(layer.linear_attn, "in_proj_qkvz")[3].T).unflatten(-1, (-1, layer.linear_attn.head_v_dim))


def _decay_pre(layer: Any, x: Tensor) -> Tensor:
    return x @ _rows(layer.linear_attn, "in_proj_ba")[1].T + layer.linear_attn.dt_bias


def _log_decay(layer: Any, before: Tensor) -> Tensor:
    return -torch.exp(layer.linear_attn.A_log) * torch.log1p(before.exp())


def _of_conv(number: int, head: str) -> Callable[[Any, Tensor], Tensor]:
    def convolved(layer: Any, x: Tensor) -> Tensor:
        mixer = layer.linear_attn
        padded = F.pad(x.mT, (mixer.conv_kernel_size - 1, 0))
        done = F.conv1d(padded, mixer.conv1d.weight, mixer.conv1d.bias, groups=x.shape[-1]).mT
        return F.silu(done.split(_widths(mixer), dim=-1)[number]).unflatten(-1, (-1, getattr(mixer, head)))

    return convolved


def _normed(layer: Any, readout: Tensor, gate: Tensor) -> Tensor:
    norm = layer.linear_attn.norm
    length = (readout.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    return (norm.weight * readout / length * gate).flatten(-2)


def _recurrence(_layer: Any, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> Tensor:
    """Step by step, in float64."""
    group = v.shape[2] // k.shape[2]
    q, k, v, beta, log_decay = (x.double() for x in (q, k, v, beta, log_decay))
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    q, k = q.repeat_interleave(group, dim=2), k.repeat_interleave(group, dim=2)
    state, outputs = v.new_zeros(len(v), v.shape[2], k.shape[-1], v.shape[-1]), list[Tensor]()
    for t in range(v.shape[1]):
        state = state * log_decay[:, t].exp()[..., None, None]
        error = (v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])) * beta[:, t, :, None]
        state = state + k[:, t, :, :, None] * error[:, :, None]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) / k.shape[-1] ** 0.5)
    return torch.stack(outputs, dim=1)


DELTA_RULES = (
    Rule(text="silu(conv(conv_in)) == k", result=Part.K, inputs=(Part.CONV_IN,), function=_of_conv(1, "head_k_dim")),
    Rule(text="silu(conv(conv_in)) == v", result=Part.V, inputs=(Part.CONV_IN,), function=_of_conv(2, "head_v_dim")),
    Rule(text="silu(conv(conv_in)) == q", result=Part.Q, inputs=(Part.CONV_IN,), function=_of_conv(0, "head_k_dim")),
    Rule(
        text="1 / (1 + exp(-write_gate_pre)) == write_gate",
        result=Part.WRITE_GATE,
        inputs=(Part.WRITE_GATE_PRE,),
        function=lambda _layer, before: 1 / (1 + torch.exp(-before)),
    ),
    Rule(
        text="-exp(A_log) log(1 + exp(decay_pre)) == log_decay",
        result=Part.LOG_DECAY,
        inputs=(Part.DECAY_PRE,),
        function=_log_decay,
    ),
    Rule(
        text="the delta rule step by step == readout",
        result=Part.READOUT,
        inputs=(Part.Q, Part.K, Part.V, Part.WRITE_GATE, Part.LOG_DECAY),
        function=_recurrence,
    ),
    Rule(
        text="silu(output_gate_pre) == output_gate",
        result=Part.OUTPUT_GATE,
        inputs=(Part.OUTPUT_GATE_PRE,),
        function=lambda _layer, z: z * z.sigmoid(),
    ),
    Rule(
        text="norm(readout) * output_gate == mixer_out",
        result=Part.MIXER_OUT,
        inputs=(Part.READOUT, Part.OUTPUT_GATE),
        function=_normed,
    ),
    Rule(
        text="mixer_out @ W_mixer == attn_out",
        result=Part.ATTN_OUT,
        inputs=(Part.MIXER_OUT,),
        function=lambda layer, x: x @ layer.linear_attn.out_proj.weight.T,
    ),
)
FUSED_RULES = (
    Rule(
        text="attn_in @ W_conv_in == conv_in",
        result=Part.CONV_IN,
        inputs=(Part.ATTN_IN,),
        function=_conv_in,
    ),
    Rule(
        text="attn_in @ W_output_gate == output_gate_pre",
        result=Part.OUTPUT_GATE_PRE,
        inputs=(Part.ATTN_IN,),
        function=_gate,
    ),
    Rule(
        text="attn_in @ W_write_gate == write_gate_pre",
        result=Part.WRITE_GATE_PRE,
        inputs=(Part.ATTN_IN,),
        function=lambda layer, x: x @ _rows(layer.linear_attn, "in_proj_ba")[0].T,
    ),
    Rule(
        text="attn_in @ W_decay + dt_bias == decay_pre",
        result=Part.DECAY_PRE,
        inputs=(Part.ATTN_IN,),
        function=_decay_pre,
    ),
)
"""Of the fused projections of Qwen 3 Next, whose rows are ordered by key head."""
