"""The words in which an architecture is described: data, not code.

A `Family` says, for each part of the vocabulary, where it is in a model of known layout (`Reach`), where the weights
are (`Weight`), what must hold between the parts (`Rule`), and how to build a tiny one (`Tiny`). A `Block` says the same
of one kind of module that any network may contain. `interp.models.table` binds them to a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from interp.core.sites import Part

OWNER = "*"
"""As a path: whichever module has the site's hook point, if it is a norm. One table serves every bridge."""

Side = Literal["input", "output", "op", "parameter", "replay", "attention"]


@dataclass(frozen=True, kw_only=True)
class View:
    """A part of a tensor that is no plain chunk: how to read it, and how to write it into a copy.

    Both get the module, for its sizes. Reading must be linear and writing back what was read must change nothing.
    """

    read: Callable[[nn.Module, Any], Tensor]
    write: Callable[[nn.Module, Any, Tensor], Any]


@dataclass(frozen=True, kw_only=True)
class ModuleCall:
    """One call of a module: what went in, what came out."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    n_rows: int | None = None
    """Sequences in the batch, where the model's input is one of tokens or vectors."""
    number: int = 0
    """How often the module was called before in this forward: the time step of a cell that is called in a loop."""


Chunk = tuple[int, int | tuple[str | int, ...]]
"""Chunk i of n of the last axis, as (i, n); or piece i of pieces in proportion to sizes, for a fused projection of
queries, keys and values: (i, ("n_heads", "n_kv_heads", "n_kv_heads"))."""
Tap = Callable[..., Tensor]
"""What a replay hands each of its values to, `tap(part, value)`; it returns the value to go on with. A loop over time
gives `step` and `n_steps` and values (batch, 1, ...), a stack of layers gives `layer`, a run beside the main one its
`branch`."""
Replay = Callable[[ModuleCall, Tap], Any]
"""Computes a module's output again, from its inputs and weights, showing every value on the way to the tap."""


@dataclass(frozen=True, kw_only=True)
class Reach:
    """Where one part lives.

    `output`, `input`: what a module returns or takes. `op`: what a torch function returns while the module runs, e.g.
    the first `sigmoid` in it. `parameter`: a parameter of the module, wherever its code uses it. `replay`: a value the
    module computes in a fused call, computed again beside it; the module's own output stays unless an edit changed
    something. `attention`: the inside of the attention function.
    """

    path: str
    """Module path; `{layer}` stands for the block's number, an empty path for the whole model."""
    side: Side = "output"
    needs: str | None = None
    """Another module a layer must have, where the path alone does not tell: `{layer}` as in the path."""
    op: str | None = None
    """Side `op`: name of the torch function, e.g. `sigmoid`, `softplus`, `linear`."""
    nth: int = 0
    """Side `op`: which of its calls while the module runs, from 0."""
    stride: int = 0
    """Side `op` of a block with layers: each layer's call comes this many calls after the one before."""
    of: str | None = None
    """Side `op`: only its calls on the output of this child (or on this parameter) of the module count."""
    only: bool = False
    """Side `op`: a second such call is refused, since nobody can tell which is meant."""
    replay: Replay | None = None
    item: int | str | None = None
    """Which argument (by number or keyword), or which entry of a tuple output; by default the first tensor. The name
    of a parameter."""
    flat: bool = False
    """The module holds (batch * pos, ...); the site is (batch, pos, ...)."""
    folded: int | str | None = None
    """A flat module may hold (batch * pos * heads, ...): the name of that number of heads, or the number."""
    view: View | None = None
    single: View | None = None
    """The view in a forward of one position, for which some modules have other code and other shapes."""
    instead: Part | None = None
    """The value can only be read: this is the part to edit, which it follows from."""
    axes: tuple[str, ...] | None = None
    """Axis names, where they are not those of the vocabulary."""
    whole: bool = False
    """The view takes and returns the whole output (a tuple), not one tensor of it."""
    heads: Literal["n_heads", "n_kv_heads"] | None = None
    """The last axis is split into this many heads."""
    head_major: bool = False
    """The module holds (batch, head, pos, d_head); the site is (batch, pos, head, d_head)."""
    chunk: Chunk | None = None
    """The part is a chunk of the last axis."""
    within_heads: bool = False
    """The chunk is one of each head's width."""
    recent: bool = False
    """The module computes all positions so far again; the site is those of this forward. Only for `instead`."""
    carry: str | None = None
    """Module whose output is this tensor plus `carry_plus`: a skip connection saved the tensor before this module."""
    carry_plus: Part = Part.MLP_OUT

    def described(self) -> str:
        """As people read it: `model.layers.3.mlp@input`, `...self_attn sigmoid()`."""
        if self.side == "op":
            of = f" of {self.of}" if self.of else ""
            return f"{self.path} {self.op}(){of}" + (f" no. {self.nth + 1}" if self.nth else "")
        said = {"input": "@input", "replay": " (replayed)", "attention": " (recomputed)"}.get(self.side, "")
        entry = "" if self.item is None else f"[{self.item}]"
        return f"{self.path}{said}{entry}"


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A weight in `x @ W` orientation: which parameter, and how to turn it."""

    path: str
    transpose: bool = True
    heads: Literal["n_heads", "n_kv_heads"] | None = None
    """W_O only: split its input axis into (head, d_head)."""
    chunk: Chunk | None = None
    """A chunk of the output axis."""
    interleaved: bool = False
    """The n chunks alternate: columns i, i + n, i + 2n, ..."""
    bias: str | None = None
    """Path of the bias, where it is not the `bias` beside a `weight`."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """An identity the probe checks: `function(module, *inputs, *modules) == result`; module is the block or layer."""

    text: str
    """As people read it, e.g. `sigmoid(attn_gate_pre) == attn_gate`."""
    result: Part
    inputs: tuple[Part, ...]
    function: Callable[..., Tensor | tuple[Tensor, Tensor]]
    """Its left side; or both, where what must be equal is no site."""
    modules: tuple[str, ...] = ()
    """For a block: children whose output (or `path@input`: first argument) the function gets as well, read with plain
    hooks; an empty path is the block. A child the block has not is `None`."""


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """How to build a tiny random model of a family, by names in transformers."""

    config: str
    model: str
    fields: Callable[[Mapping[str, int]], dict[str, Any]]
    """Config fields from the sizes d_vocab, d_model, d_mlp, d_head, n_layers, n_heads, n_kv_heads and n_ctx."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture."""

    name: str
    model_types: tuple[str, ...]
    """`config.model_type` values this table is for."""
    blocks: str
    """Path of the list of blocks."""
    parts: Mapping[Part, Reach | tuple[Reach, ...]]
    """Where each part is. Of several reaches, the first whose module a layer has: layers may differ in kind."""
    weights: Mapping[str, Weight | tuple[Weight, ...]]
    """Each weight; of several, the first that a layer has."""
    optional: frozenset[Part] = frozenset()
    """Parts that some configurations of the family do not have at all."""
    sizes: Mapping[str, str] = field(default_factory=dict[str, str])
    """Axis -> where its size is: `PATH:DIM` of a parameter, or `PATH.attribute`, in the first layer that has it."""
    rules: tuple[Rule, ...] = ()
    tiny: Mapping[str, Tiny] = field(default_factory=dict[str, Tiny])
    """Tiny models of this family by name, as in `interp.load("tiny-llama")`."""
    inputs: Literal["tokens", "pixels"] = "tokens"
    left_padding: bool = True
    """Whether padding before a text leaves its values alone: a recurrence may have no mask for it."""
    batch_cache: bool = True
    """Whether the model decodes several rows at once with a cache as it does without."""
    stream_scale: Callable[[nn.Module, int], float] | None = None
    """Factor on the stream between a block and the next."""
    act: str | None = None
    """Path of the MLP's non-linearity."""
    down: str | None = None
    """Path of the projection that reads `neurons`."""
    out: str | None = None
    """Path of the projection that reads `z`."""
    after_attn: str | None = None
    after_mlp: str | None = None
    """Norms between a sublayer's projection and the stream (Gemma); `OWNER` if the site is a hook point in it."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """A kind of module that any network may contain: its sites are `path:part`, e.g. `encoder.lstm:input_gate.0`."""

    name: str
    classes: tuple[str, ...]
    """Class names it serves."""
    parts: Mapping[Part, Reach]
    """Paths are relative to the module; an empty one is the module itself."""
    has: tuple[str, ...] = ()
    """Children or attributes the module must have, so that a namesake is not taken for it."""
    when: Callable[[nn.Module], bool] | None = None
    """Further condition, e.g. which half of a fused projection is the gate."""
    layers: Callable[[nn.Module], int] | None = None
    """Number of layers inside the module, where its parts are per layer."""
    branches: Callable[[nn.Module], tuple[str, ...]] | None = None
    """Further runs beside the main one, each with all parts and layers: their sites are `path@branch:part`."""
    rules: tuple[Rule, ...] = ()
    mixes: Part | None = None
    """A gate in which the block's output is affine, `gate * a + (1 - gate) * b`: the probe closes and opens it."""
    weights: Mapping[str, Weight] = field(default_factory=dict[str, Weight])
    """Its weights, paths relative to the module; used where a family's own layer lacks them."""


@dataclass(frozen=True, kw_only=True)
class Dims:
    """Sizes read from real tensors; `None` where the network has no such thing."""

    n_layers: int | None = None
    d_model: int | None = None
    n_heads: int | None = None
    n_kv_heads: int | None = None
    d_head: int | None = None
    d_mlp: int | None = None
    d_vocab: int | None = None
    n_ctx: int | None = None
    more: Mapping[str, int] = field(default_factory=dict[str, int])
    """Sizes of the family's own axes, e.g. `expert`."""

    def size(self, axis: str) -> int | None:
        """Size of a named axis; `None` if it depends on the input."""
        names = {"head": "n_heads", "kv_head": "n_kv_heads"}
        return self.more.get(axis, getattr(self, names.get(axis, axis), None))


_BLOCKS: dict[str, list[Block]] = {}


def register_block(block: Block) -> None:
    """Give modules of a class their sites: a user's own gated MLP, say, in any network. The newest of a name wins."""
    for name in block.classes:
        _BLOCKS[name] = [block, *(other for other in _BLOCKS.get(name, []) if other.name != block.name)]


def block_of(module: nn.Module) -> Block | None:
    """The kind of a module, if it is a known one: registered, or of `interp/models/blocks/`. Derived classes count."""
    from interp.models.blocks import known_blocks  # the files there import this one

    for cls in type(module).__mro__:
        for block in (*_BLOCKS.get(cls.__name__, []), *known_blocks().get(cls.__name__, [])):
            if all(hasattr(module, name) for name in block.has) and (block.when is None or block.when(module)):
                return block
    return None
