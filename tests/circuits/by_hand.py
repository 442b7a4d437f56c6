"""An independent oracle: small Llamas and GPT-2s written out in plain torch, one destination and one head at a time.

Weights are read from the model, all computation is here and in float64. `given[u, v]` says how much of source u's
current output destination v gets; the rest of it comes from the reference. Nothing of `interp.circuits` is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from interp.models.model import LoadedModel

Sources = dict[str, Tensor]


def run(
    model: LoadedModel,
    ids: Tensor,
    given: Mapping[tuple[str, str], float] | None = None,
    reference: Mapping[str, Tensor] | None = None,
    *,
    split: bool = False,
) -> tuple[Tensor, Sources]:
    """Logits at the last position, and what every source wrote. Edges not in `given` carry their current value."""
    hand = _Gpt2(model) if model.table.name == "gpt2" else _Llama(model, split)
    sources: Sources = {"embed": hand.embed(ids)}
    biases = torch.zeros_like(sources["embed"])

    def read(destination: str) -> Tensor:
        total = biases.clone()
        for name, value in sources.items():
            share = 1.0 if given is None else given.get((name, destination), 1.0)
            total = total + share * value + ((1 - share) * reference[name] if reference is not None else 0)
        return total

    n_heads, n_kv = model.dims.n_heads, model.dims.n_kv_heads
    assert n_heads is not None and n_kv is not None
    for layer in range(model.n_layers):
        heads: Sources = {}
        for head in range(n_heads):
            group = head // (n_heads // n_kv)
            q = hand.part("Q", layer, head, read(f"a{layer}.h{head}.q"))
            k = hand.part("K", layer, group, read(f"a{layer}.g{group}.k"))
            v = hand.part("V", layer, group, read(f"a{layer}.g{group}.v"))
            scores = hand.turn(q) @ hand.turn(k).mT / q.shape[-1] ** 0.5
            future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            heads[f"a{layer}.h{head}"] = (
                scores.masked_fill(future, -torch.inf).softmax(-1) @ v @ model.weight("W_O", layer)[head]
            )
        sources |= heads
        bias = model.table.bias("W_O", layer)
        biases = biases + (0 if bias is None else bias)
        sources[f"m{layer}"] = hand.mlp(layer, lambda half, layer=layer: read(f"m{layer}{half}"))
    return hand.logits(read("logits")[:, -1]), sources


class _Llama:
    halves = (".gate", ".up")

    def __init__(self, model: LoadedModel, split: bool = False) -> None:
        self.model, self.state, self.split = model, model.module.state_dict(), split

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.weight("W_E")[ids].detach()

    def norm(self, name: str, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * self.state[f"model.{name}.weight"]

    def part(self, kind: str, layer: int, head: int, stream: Tensor) -> Tensor:
        weight = self.model.weight(f"W_{kind}", layer)
        width = self.model.weight("W_O", layer).shape[1]
        return self.norm(f"layers.{layer}.input_layernorm", stream) @ weight[:, head * width : (head + 1) * width]

    def turn(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        rate = 10_000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
        angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * rate
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def mlp(self, layer: int, read: Callable[[str], Tensor]) -> Tensor:
        name = f"layers.{layer}.post_attention_layernorm"
        gate, up = (self.norm(name, read(half if self.split else "")) for half in (".gate", ".up"))
        a, b = gate @ self.model.weight("W_gate", layer), up @ self.model.weight("W_up", layer)
        return (a * torch.sigmoid(a) * b) @ self.model.weight("W_down", layer)

    def logits(self, stream: Tensor) -> Tensor:
        return self.norm("norm", stream) @ self.model.weight("W_U")


class _Gpt2(_Llama):
    def embed(self, ids: Tensor) -> Tensor:
        return (self.model.weight("W_E")[ids] + self.state["transformer.wpe.weight"][: ids.shape[1]]).detach()

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * self.state[f"transformer.{name}.weight"] + self.state[f"transformer.{name}.bias"]

    def part(self, kind: str, layer: int, head: int, stream: Tensor) -> Tensor:
        width, d = self.model.weight("W_O", layer).shape[1], stream.shape[-1]
        columns = slice("QKV".index(kind) * d + head * width, "QKV".index(kind) * d + (head + 1) * width)
        fused, bias = (self.state[f"transformer.h.{layer}.attn.c_attn.{name}"] for name in ("weight", "bias"))
        return self.norm(f"h.{layer}.ln_1", stream) @ fused[:, columns] + bias[columns]

    def turn(self, x: Tensor) -> Tensor:
        return x

    def mlp(self, layer: int, read: Callable[[str], Tensor]) -> Tensor:
        names = ("c_fc", "c_proj")
        inner, outer = ([self.state[f"transformer.h.{layer}.mlp.{n}.{w}"] for w in ("weight", "bias")] for n in names)
        a = self.norm(f"h.{layer}.ln_2", read("")) @ inner[0] + inner[1]
        return 0.5 * a * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (a + 0.044715 * a**3))) @ outer[0] + outer[1]

    def logits(self, stream: Tensor) -> Tensor:
        return self.norm("ln_f", stream) @ self.model.weight("W_U")
