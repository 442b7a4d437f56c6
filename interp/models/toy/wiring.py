"""Writing a transformer by hand: named directions of the stream, heads and neurons that read and write them.

    wiring = Wiring(n_layers=2, directions={"token": 8, "out": 8})
    wiring.embed("A", {"token": one_hot(0, 8)})
    wiring.head(1, 2, q=("token", 8.0), k="before", v="token", out="out")

The model is a Hugging Face Llama with its weights set, so every tool works on it. Two things make its sums easy:
a constant channel far larger than the rest keeps the root mean square of every position, so that the norms are close to
the identity (within about 0.1 %); and rotary positions turn one pair of dimensions of a head by 1 radian per position
and leave the others still. A head that looks one position back uses that pair, all others match content.
Every weight that is not set gets a little noise, so that no other edge is exactly zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import unknown
from interp.core.seed import torch_generator
from interp.models.model import LoadedModel
from interp.models.tiny import D_VOCAB, byte_tokenizer

ONE = 64.0
"""The constant channel; signals are about 1."""
D_HEAD = 20
PAIR = D_HEAD // 2
"""Dimension that rotates together with dimension 0; the other 18 hold content."""
START = "<"
"""First token of every prompt: where a head looks that finds nothing."""


def one_hot(index: int, size: int) -> Float[Tensor, " size"]:
    """A unit vector."""
    return torch.eye(size)[index]


class Wiring:
    """A Llama whose weights are being set. Directions are named slices of the residual stream."""

    def __init__(
        self,
        *,
        directions: Mapping[str, int],
        n_layers: int = 2,
        n_heads: int = 4,
        n_kv_heads: int = 4,
        d_mlp: int = 8,
        noise: float = 0.01,
        seed: int = 0,
    ) -> None:
        import transformers

        sizes = {"one": 1, "start": 1, **directions}
        ends = torch.tensor(list(sizes.values())).cumsum(0).tolist()
        self.where = {name: range(end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads
        d_model = math.ceil(ends[-1] / n_heads) * n_heads  # what the configuration asks for
        config = transformers.LlamaConfig(
            vocab_size=D_VOCAB, hidden_size=d_model, intermediate_size=d_mlp, num_hidden_layers=n_layers,
            num_attention_heads=n_heads, num_key_value_heads=n_kv_heads, head_dim=D_HEAD, tie_word_embeddings=False,
            max_position_embeddings=64, rope_parameters={"rope_type": "default", "rope_theta": 1e60},
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            self.module: Any = transformers.LlamaForCausalLM(config).eval()
        self._fill(noise, seed)
        self.embed(START, {"start": torch.ones(1)})

    def _fill(self, noise: float, seed: int) -> None:
        """Noise everywhere but in the embedding and where the constant channel is read; norms that undo themselves."""
        one = self.where["one"][0]
        d_model = self.module.config.hidden_size
        with torch.no_grad():
            for name, weight in self.module.named_parameters():
                weight.requires_grad_(False)
                if weight.ndim == 1:
                    weight.fill_(ONE / math.sqrt(d_model))
                elif "embed_tokens" in name or "lm_head" in name:
                    weight.zero_()
                else:
                    weight.copy_(noise * torch.randn(weight.shape, generator=torch_generator(seed, name)))
                    if weight.shape[1] == d_model:
                        weight[:, one] = 0
                    else:
                        weight[one] = 0
            self.module.model.embed_tokens.weight[:, one] = ONE

    def slice(self, name: str) -> slice:
        if name not in self.where:
            raise unknown("direction", name, self.where)
        return slice(self.where[name].start, self.where[name].stop)

    def embed(self, letter: str, parts: Mapping[str, Tensor]) -> None:
        """What a letter's embedding holds besides the constant."""
        for name, value in parts.items():
            self.module.model.embed_tokens.weight[ord(letter), self.slice(name)] = value

    def unembed(self, letters: str, name: str, scale: float = 12.0) -> None:
        """Logits of letters, read from the members of a direction in order."""
        for letter, dim in zip(letters, self.where[name], strict=True):
            self.module.lm_head.weight[ord(letter), dim] = scale

    def bias(self, letter: str, logit: float) -> None:
        """A constant logit."""
        self.module.lm_head.weight[ord(letter), self.where["one"][0]] = logit / ONE

    def back(self, layer: int, head: int, sharp: float = 12.0) -> None:
        """Look one position back: score = sharp * cos(distance - 1)."""
        attention, rows = self.module.model.layers[layer].self_attn, self._rows(head)
        one = self.where["one"][0]
        gain = math.sqrt(sharp * math.sqrt(D_HEAD)) / ONE
        attention.q_proj.weight[rows.start, one] = gain
        keys = self._rows(self._group(head)).start
        attention.k_proj.weight[keys, one] = gain * math.cos(1.0)
        attention.k_proj.weight[keys + PAIR, one] = gain * math.sin(1.0)

    def match(self, layer: int, head: int, q: str, k: str, sharp: float = 9.0) -> None:
        """Look where the keys' direction equals the queries'; where nothing does, look at the start.

        A direction `one` for the queries looks for the first member of the keys' direction.
        """
        attention, dims = self.module.model.layers[layer].self_attn, self._content(len(self.where[k]))
        queries, keys = self._rows(head).start, self._rows(self._group(head)).start
        gain = math.sqrt(sharp * math.sqrt(D_HEAD))
        one, start = self.where["one"][0], self.where["start"][0]
        for i, dim in enumerate(dims):
            source, size = (one, gain / ONE) if q == "one" else (self.where[q][i], gain)
            attention.q_proj.weight[queries + dim, source] = size
            attention.k_proj.weight[keys + dim, self.where[k][i]] = gain
        rest = D_HEAD - 1
        attention.q_proj.weight[queries + rest, one] = gain / ONE
        attention.k_proj.weight[keys + rest, start] = gain / 2

    def carry(self, layer: int, head: int, v: str, out: str, scale: float = 1.0) -> None:
        """Move a direction from where the head looks to where it is."""
        attention, dims = self.module.model.layers[layer].self_attn, self._content(len(self.where[v]))
        values, outs = self._rows(self._group(head)).start, self._rows(head).start
        for i, dim in enumerate(dims):
            attention.v_proj.weight[values + dim, self.where[v][i]] = scale
            attention.o_proj.weight[self.where[out][i], outs + dim] = 1.0

    def neuron(
        self, layer: int, index: int, *, gate: tuple[str, float, float], up: tuple[str, float], out: tuple[str, float]
    ) -> None:
        """silu(slope * (gate - threshold)) * up, added to a direction; an `up` of `one` is 1."""
        mlp, one = self.module.model.layers[layer].mlp, self.where["one"][0]
        name, slope, threshold = gate
        mlp.gate_proj.weight[index, self.where[name][0]] = slope
        mlp.gate_proj.weight[index, one] = -slope * threshold / ONE
        mlp.up_proj.weight[index, self.where[up[0]][0]] = up[1] / (ONE if up[0] == "one" else 1.0)
        mlp.down_proj.weight[self.where[out[0]][0], index] = out[1]

    def build(self, name: str) -> LoadedModel:
        """The finished model; its tokens are bytes, so every letter is one token."""
        for parameter in self.module.parameters():
            parameter.requires_grad_(True)
        return LoadedModel(module=self.module, tokenizer=byte_tokenizer(), source=f"planted-{name}")

    def _rows(self, head: int) -> range:
        return range(head * D_HEAD, (head + 1) * D_HEAD)

    def _group(self, head: int) -> int:
        return head * self.n_kv_heads // self.n_heads

    def _content(self, n: int) -> list[int]:
        """Dimensions of a head that do not rotate, but for the last, which looks for the start."""
        return [dim for dim in range(1, D_HEAD - 1) if dim != PAIR][:n]
