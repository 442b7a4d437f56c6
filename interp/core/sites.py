"""Sites: the named points of a network at which activations are read and edited.

A `Site` is a frozen value. Its canonical text is `part.layer` (`resid_post.12`, `gate_pre.3`), a part alone
where there is one per model (`embed`, `logits`), or a module path for any network (`features.3`, and
`features.3@input` for what goes in). Text is parsed once, at the edge, by `FamilyTable.resolve`, which also
accepts TransformerLens names and patterns (`neurons.*`, `z.{3,5}`, `resid_post.10-14`).

The vocabulary is `PARTS`: for each part its meaning, its shape and its side of the non-linearity.
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from enum import StrEnum

from interp.core.errors import SiteError


class Part(StrEnum):
    """What a site holds. The text of a member is what users type."""

    EMBED = "embed"
    RESID_PRE = "resid_pre"
    RESID_MID = "resid_mid"
    RESID_POST = "resid_post"
    ATTN_IN = "attn_in"
    Q = "q"
    K = "k"
    V = "v"
    ATTN_SCORES = "attn_scores"
    PATTERN = "pattern"
    Z = "z"
    ATTN_OUT = "attn_out"
    MLP_IN = "mlp_in"
    GATE_PRE = "gate_pre"
    GATE = "gate"
    UP = "up"
    NEURONS_PRE = "neurons_pre"
    NEURONS = "neurons"
    MLP_OUT = "mlp_out"
    FINAL_NORM = "final_norm"
    LOGITS = "logits"
    MODULE = "module"


@dataclass(frozen=True)
class PartInfo:
    """One row of the vocabulary."""

    meaning: str
    axes: tuple[str, ...]
    """Axis names in order; sizes come from the model's `Dims`."""
    side: str
    """`pre` or `post` the non-linearity it belongs to, `linear` where there is none."""
    lens: str | None
    """TransformerLens name, with `{layer}` where there is one."""
    words: tuple[str, ...] = ()
    """Other engines' words for the same point."""
    per_layer: bool = True


_RESID = ("batch", "pos", "d_model")
_HEADS = ("batch", "pos", "head", "d_head")
_KV = ("batch", "pos", "kv_head", "d_head")
_MLP = ("batch", "pos", "d_mlp")
_PAIRS = ("batch", "head", "query", "key")

PARTS: dict[Part, PartInfo] = {
    Part.EMBED: PartInfo("token embeddings, without positions", _RESID, "linear", "hook_embed", per_layer=False),
    Part.RESID_PRE: PartInfo("residual stream entering the block", _RESID, "linear", "blocks.{layer}.hook_resid_pre"),
    Part.ATTN_IN: PartInfo("normed input of attention", _RESID, "linear", None),
    Part.Q: PartInfo("queries, before rotary embedding", _HEADS, "linear", "blocks.{layer}.attn.hook_q"),
    Part.K: PartInfo("keys, before rotary embedding", _KV, "linear", "blocks.{layer}.attn.hook_k"),
    Part.V: PartInfo("values", _KV, "linear", "blocks.{layer}.attn.hook_v"),
    Part.ATTN_SCORES: PartInfo(
        "masked attention scores, before the softmax", _PAIRS, "pre", "blocks.{layer}.attn.hook_attn_scores"
    ),
    Part.PATTERN: PartInfo("attention weights, rows sum to 1", _PAIRS, "post", "blocks.{layer}.attn.hook_pattern"),
    Part.Z: PartInfo("head outputs before W_O", _HEADS, "linear", "blocks.{layer}.attn.hook_z"),
    Part.ATTN_OUT: PartInfo("what attention adds to the stream", _RESID, "linear", "blocks.{layer}.hook_attn_out"),
    Part.RESID_MID: PartInfo(
        "residual stream between attention and MLP", _RESID, "linear", "blocks.{layer}.hook_resid_mid"
    ),
    Part.MLP_IN: PartInfo("normed input of the MLP", _RESID, "linear", None),
    Part.GATE_PRE: PartInfo(
        "x @ W_gate, before the gate's non-linearity", _MLP, "pre", "blocks.{layer}.mlp.hook_pre", ("mlp_pre",)
    ),
    Part.GATE: PartInfo("act(gate_pre)", _MLP, "post", None),
    Part.UP: PartInfo(
        "x @ W_up, the ungated branch", _MLP, "linear", "blocks.{layer}.mlp.hook_pre_linear", ("mlp_pre_linear",)
    ),
    Part.NEURONS_PRE: PartInfo("x @ W_in of an ungated MLP", _MLP, "pre", "blocks.{layer}.mlp.hook_pre", ("mlp_pre",)),
    Part.NEURONS: PartInfo(
        "input of W_down: gate * up, or act(neurons_pre) where nothing is gated",
        _MLP,
        "post",
        "blocks.{layer}.mlp.hook_post",
        ("mlp_act",),
    ),
    Part.MLP_OUT: PartInfo("what the MLP adds to the stream", _RESID, "linear", "blocks.{layer}.hook_mlp_out"),
    Part.RESID_POST: PartInfo("residual stream leaving the block", _RESID, "linear", "blocks.{layer}.hook_resid_post"),
    Part.FINAL_NORM: PartInfo("normed stream the unembedding reads", _RESID, "linear", None, per_layer=False),
    Part.LOGITS: PartInfo("next-token logits", ("batch", "pos", "d_vocab"), "linear", None, per_layer=False),
    Part.MODULE: PartInfo("what a module returns, or takes (`path@input`)", ("...",), "linear", None, per_layer=False),
}
"""The vocabulary, in the order in which a block computes it."""

HEAD_AXES = ("head", "kv_head")


@dataclass(frozen=True)
class Site:
    """One point of a network: a part at a layer, or a module path."""

    part: Part
    layer: int | None = None
    path: str | None = None

    def __post_init__(self) -> None:
        if (self.part is Part.MODULE) != (self.path is not None):
            raise SiteError("a module site needs a path, and only a module site has one")
        if PARTS[self.part].per_layer != (self.layer is not None):
            raise SiteError(f"{self.part} {'needs' if PARTS[self.part].per_layer else 'takes no'} layer")

    def __str__(self) -> str:
        if self.path is not None:
            return self.path
        return self.part.value if self.layer is None else f"{self.part.value}.{self.layer}"

    def __repr__(self) -> str:
        return f"Site({self})"

    @property
    def info(self) -> PartInfo:
        return PARTS[self.part]

    @property
    def aliases(self) -> tuple[str, ...]:
        """Other names of this site that are accepted as input."""
        names = [self.info.lens] if self.info.lens else []
        names += [f"{word}.{{layer}}" for word in self.info.words]
        return tuple(name.format(layer=self.layer) for name in names)


_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"^(\d+)-(\d+)$")
MAX_RANGE = 10_000
"""Longest layer range that is written out; no network has as many, a slip of the key has."""


def expand(pattern: str) -> list[str]:
    """Split braces and ranges: `z.{3,5}` -> `z.3 z.5`, `resid_post.10-12` -> three names. Globs stay."""
    brace = _BRACES.search(pattern)
    if brace:
        head, tail = pattern[: brace.start()], pattern[brace.end() :]
        return [name for choice in brace[1].split(",") for name in expand(head + choice.strip() + tail)]
    stem, _, last = pattern.rpartition(".")
    span = _RANGE.match(last)
    if stem and span:
        low, high = int(span[1]), int(span[2])
        if low > high:
            raise SiteError(f"empty layer range in {pattern!r}: {low} is after {high}")
        if high - low >= MAX_RANGE:
            raise SiteError(f"layer range in {pattern!r} names {high - low + 1} layers; at most {MAX_RANGE}")
        return [f"{stem}.{layer}" for layer in range(low, high + 1)]
    return [pattern]


def is_glob(name: str) -> bool:
    """Whether the name has wildcards left."""
    return any(char in name for char in "*?[")


def matches(name: str, pattern: str) -> bool:
    """Glob match, case-sensitive."""
    return fnmatch.fnmatchcase(name, pattern)
