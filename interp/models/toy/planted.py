"""Small transformers whose circuit is known, because it was written into their weights.

    induction    a head that looks one back and a head that finds the earlier copy of this letter: "..AB..A" -> B
    lookup       letters that stand for (key, value), a query for a key: one head finds it (grouped keys and values)
    two_hop      two tables; the value found in the first is the key of the second
    mlp_gate     a SwiGLU neuron that is an AND: the gate is moved by a head, the up half is the last letter
    decoy        induction, and a head with the same pattern and values that writes where nobody reads
    redundant    two heads bring one flag, either is enough (an MLP that saturates): silencing one changes nothing
    negative     induction, and a later head that works against the answer
`edges` are all edges that carry what differs between the prompts. An edge that carries the same in both (a head's own
position, the constant) cannot be seen by any patching and is not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from interp.core.errors import InterpError, unknown
from interp.core.seed import torch_generator
from interp.models.model import LoadedModel
from interp.models.toy.wiring import START, Wiring, one_hot

LETTERS = "ABCDEFGH"
Edge = tuple[str, str]
Prompt = tuple[str, str, str, str]
"""Clean, corrupt, right, wrong."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Planted:
    """A model, prompts it solves, and the edges by which it does."""

    name: str
    model: LoadedModel
    prompts: tuple[Prompt, ...]
    edges: tuple[Edge, ...]
    """Source and destination by name, e.g. ("a0.h1", "a1.g2.k"); keys and values belong to kv groups."""
    split_mlp: bool = False
    """Whether the edges tell gate and up apart."""
    decoys: tuple[str, ...] = ()
    """Sources that look like part of the circuit and are not."""


def planted(name: str, n: int = 24, seed: int = 0) -> Planted:
    """The planted model of that name with `n` prompt pairs."""
    if name not in MODELS:
        raise unknown("planted model", name, MODELS)
    if n < 1:
        raise InterpError(f"n={n} prompt pairs; ask for at least 1")
    return MODELS[name](n, seed)


def planted_names() -> list[str]:
    return list(MODELS)


def planted_model(name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> LoadedModel:
    """The model alone, where it is wanted."""
    made = planted(name, 1).model
    return LoadedModel(module=made.module.to(device=device, dtype=dtype), tokenizer=made.tokenizer, source=made.source)


def _draw(n: int, size: int, generator: torch.Generator) -> list[int]:
    """`n` different numbers below `size`."""
    return torch.randperm(size, generator=generator)[:n].tolist()


def _inductive(n_layers: int, **more: int) -> Wiring:
    """A layer-0 head that looks one back and a layer-1 head that finds the earlier copy."""
    size = len(LETTERS)
    wiring = Wiring(n_layers=n_layers, directions={"token": size, "before": size, "out": size, **more})
    for i, letter in enumerate(LETTERS):
        wiring.embed(letter, {"token": one_hot(i, size)})
    wiring.unembed(LETTERS, "out")
    wiring.back(0, 1)
    wiring.carry(0, 1, "token", "before")
    wiring.match(1, 2, q="token", k="before")
    wiring.carry(1, 2, "token", "out")
    return wiring


INDUCTION = (
    ("embed", "a0.g1.v"), ("a0.h1", "a1.g2.k"), ("embed", "a1.h2.q"), ("embed", "a1.g2.v"), ("a1.h2", "logits"),
)  # fmt: skip


def _induction_prompts(n: int, seed: int) -> tuple[Prompt, ...]:
    """Three corruptions in turn: of the last letter (queries), of the earlier keys, of the earlier values."""
    generator, made = torch_generator(seed, "induction prompts"), list[Prompt]()
    for i in range(n):
        a, b, c, d = (LETTERS[j] for j in _draw(4, len(LETTERS), generator))
        clean = f"{START}{a}{b}{c}{d}{a}"
        corrupt = (f"{START}{a}{b}{c}{d}{c}", f"{START}{c}{b}{a}{d}{a}", f"{START}{a}{d}{c}{b}{a}")[i % 3]
        made.append((clean, corrupt, b, d))
    return tuple(made)


def _induction(n: int, seed: int) -> Planted:
    model = _inductive(2).build("induction")
    return Planted(name="induction", model=model, prompts=_induction_prompts(n, seed), edges=INDUCTION)


def _decoy(n: int, seed: int) -> Planted:
    wiring = _inductive(2, unread=len(LETTERS))
    wiring.match(1, 0, q="token", k="before")
    wiring.carry(1, 0, "token", "unread")
    wiring.match(1, 3, q="token", k="before")
    wiring.carry(1, 3, "token", "unread", scale=-2.0)
    return Planted(
        name="decoy", model=wiring.build("decoy"), prompts=_induction_prompts(n, seed), edges=INDUCTION,
        decoys=("a1.h0", "a1.h3"),
    )  # fmt: skip


def _negative(n: int, seed: int) -> Planted:
    """A head of layer 2 finds, at its own position, the answer already written and takes 40 % of it away."""
    wiring = _inductive(3)
    wiring.match(2, 1, q="out", k="out")
    wiring.carry(2, 1, "out", "out", scale=-0.4)
    edges = (*INDUCTION, ("a1.h2", "a2.h1.q"), ("a1.h2", "a2.g1.k"), ("a1.h2", "a2.g1.v"), ("a2.h1", "logits"))
    return Planted(name="negative", model=wiring.build("negative"), prompts=_induction_prompts(n, seed), edges=edges)


def _lookup(n: int, seed: int) -> Planted:
    size, answers = 4, "wxyz"
    wiring = Wiring(n_kv_heads=2, directions={"query": size, "key": size, "value": size, "out": size})
    for k in range(size):
        wiring.embed(str(k), {"query": one_hot(k, size)})
        for v in range(size):
            wiring.embed(_fact(k, v, size), {"key": one_hot(k, size), "value": one_hot(v, size)})
    wiring.unembed(answers, "out")
    wiring.match(0, 2, q="query", k="key")
    wiring.carry(0, 2, "value", "out")
    generator, made = torch_generator(seed, "lookup prompts"), list[Prompt]()
    for i in range(n):
        keys, values = _draw(size, size, generator), _draw(size, size, generator)
        asked, other = _draw(2, size, generator)
        swapped = [{asked: other, other: asked}.get(j, j) for j in range(size)]
        new = (
            _table(keys, values, size) + str(keys[other]),
            _table([keys[j] for j in swapped], values, size) + str(keys[asked]),
            _table(keys, [values[j] for j in swapped], size) + str(keys[asked]),
        )[i % 3]
        clean = _table(keys, values, size) + str(keys[asked])
        made.append((START + clean, START + new, answers[values[asked]], answers[values[other]]))
    edges = (("embed", "a0.h2.q"), ("embed", "a0.g1.k"), ("embed", "a0.g1.v"), ("a0.h2", "logits"))
    return Planted(name="lookup", model=wiring.build("lookup"), prompts=tuple(made), edges=edges)


def _fact(key: int, value: int, size: int, first: str = "A") -> str:
    """The letter that stands for one key and its value."""
    return chr(ord(first) + size * key + value)


def _table(keys: list[int], values: list[int], size: int, first: str = "A") -> str:
    return "".join(_fact(k, v, size, first) for k, v in zip(keys, values, strict=True))


def _two_hop(n: int, seed: int) -> Planted:
    size, answers = 3, "xyz"
    names = ("query", "key1", "value1", "middle", "key2", "value2", "out")
    wiring = Wiring(directions=dict.fromkeys(names, size))
    for k in range(size):
        wiring.embed(str(k), {"query": one_hot(k, size)})
        for v in range(size):
            wiring.embed(_fact(k, v, size), {"key1": one_hot(k, size), "value1": one_hot(v, size)})
            wiring.embed(_fact(k, v, size, "a"), {"key2": one_hot(k, size), "value2": one_hot(v, size)})
    wiring.unembed(answers, "out")
    wiring.match(0, 3, q="query", k="key1")
    wiring.carry(0, 3, "value1", "middle")
    wiring.match(1, 0, q="middle", k="key2")
    wiring.carry(1, 0, "value2", "out")
    edges = (
        ("embed", "a0.h3.q"), ("embed", "a0.g3.k"), ("embed", "a0.g3.v"), ("a0.h3", "a1.h0.q"),
        ("embed", "a1.g0.k"), ("embed", "a1.g0.v"), ("a1.h0", "logits"),
    )  # fmt: skip
    prompts = _two_hop_prompts(n, seed, size, answers)
    return Planted(name="two_hop", model=wiring.build("two_hop"), prompts=prompts, edges=edges)


def _two_hop_prompts(n: int, seed: int, size: int, answers: str) -> tuple[Prompt, ...]:
    """Five corruptions in turn: the query, and the keys and values of either table."""
    generator, made = torch_generator(seed, "two-hop prompts"), list[Prompt]()
    for i in range(n):
        columns = [_draw(size, size, generator) for _ in range(4)]
        asked, other = _draw(2, size, generator)
        middle = [columns[2].index(columns[1][j]) for j in (asked, other)]
        right, wrong = (answers[columns[3][j]] for j in middle)
        new, query = [list(column) for column in columns], asked
        if i % 5 == 0:
            query = other
        else:
            a, b = (asked, other) if i % 5 < 3 else middle
            column = new[i % 5 - 1]
            column[a], column[b] = column[b], column[a]
        texts = [
            START + _table(c[0], c[1], size) + _table(c[2], c[3], size, "a") + str(columns[0][q])
            for c, q in ((columns, asked), (new, query))
        ]
        made.append((texts[0], texts[1], right, wrong))
    return tuple(made)


def _flags(n_heads_used: tuple[int, ...]) -> Wiring:
    """A flag (P present, p absent) brought to the end by some heads, and the answers Y and N."""
    wiring = Wiring(directions={"flag": 1, "here": 1, "last": 1, "brought": 1, "yes": 1})
    wiring.embed("P", {"flag": torch.ones(1), "here": torch.ones(1)})
    wiring.embed("p", {"here": torch.ones(1)})
    wiring.embed("Q", {"last": torch.ones(1)})
    wiring.unembed("Y", "yes")
    wiring.bias("N", 6.0)
    for head in n_heads_used:
        wiring.match(0, head, q="one", k="here")
        wiring.carry(0, head, "flag", "brought")
    return wiring


def _filled(flag: str, last: str, generator: torch.Generator) -> str:
    """A prompt with the flag among letters that mean nothing."""
    middle = [chr(ord("a") + int(torch.randint(8, (), generator=generator))) for _ in range(3)]
    middle.insert(int(torch.randint(4, (), generator=generator)), flag)
    return START + "".join(middle) + last


def _mlp_gate(n: int, seed: int) -> Planted:
    wiring = _flags((1,))
    wiring.neuron(1, 3, gate=("brought", 8.0, 0.5), up=("last", 1.0), out=("yes", 0.25))
    generator, made = torch_generator(seed, "gate prompts"), list[Prompt]()
    for i in range(n):
        both = _filled("P", "Q", generator)
        less = (both.replace("P", "p"), both.replace("Q", "q"), both.replace("P", "p").replace("Q", "q"))[i % 3]
        made.append((both, less, "Y", "N") if i % 2 == 0 or i % 3 == 2 else (less, both, "N", "Y"))
    edges = (("embed", "a0.g1.v"), ("a0.h1", "m1.gate"), ("embed", "m1.up"), ("m1", "logits"))
    return Planted(name="mlp_gate", model=wiring.build("mlp_gate"), prompts=tuple(made), edges=edges, split_mlp=True)


def _redundant(n: int, seed: int) -> Planted:
    """The clean prompt has the flag: only then does one of the pair make up for the other."""
    wiring = _flags((0, 2))
    wiring.neuron(1, 0, gate=("brought", 20.0, 0.2), up=("one", 1.0), out=("yes", 0.125))
    wiring.neuron(1, 1, gate=("brought", 20.0, 0.6), up=("one", 1.0), out=("yes", -0.125))
    generator, made = torch_generator(seed, "redundant prompts"), list[Prompt]()
    for _ in range(n):
        clean = _filled("P", "Q", generator)
        made.append((clean, clean.replace("P", "p"), "Y", "N"))
    edges = (
        ("embed", "a0.g0.v"), ("embed", "a0.g2.v"), ("a0.h0", "m1"), ("a0.h2", "m1"), ("m1", "logits"),
    )  # fmt: skip
    return Planted(name="redundant", model=wiring.build("redundant"), prompts=tuple(made), edges=edges)


MODELS: dict[str, Callable[[int, int], Planted]] = {
    "induction": _induction, "lookup": _lookup, "two_hop": _two_hop, "mlp_gate": _mlp_gate, "decoy": _decoy,
    "redundant": _redundant, "negative": _negative,
}  # fmt: skip
