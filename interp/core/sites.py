"""Sites: the named points of a network at which activations are read and edited.

A `Site` is a frozen value. Its canonical text is `part.layer` (`resid_post.12`, `gate_pre.3`), a part alone
where there is one per model (`embed`, `logits`), or a module path for any network (`features.3`, and
`features.3@input` for what goes in), or `path:part` for a module of a known kind (`encoder.lstm:input_gate.0`).
Text is parsed once, at the edge, by `FamilyTable.resolve`, which also
accepts TransformerLens names and patterns (`neurons.*`, `z.{3,5}`, `resid_post.10-14`).

The words are those of `interp.core.vocabulary`.
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass

from interp.core.errors import SiteError
from interp.core.vocabulary import PARTS, Part, PartInfo

HEAD_AXES = ("head", "kv_head")


@dataclass(frozen=True)
class Site:
    """One point of a network: a part at a layer, a module path, or a part of the module at a path."""

    part: Part
    layer: int | None = None
    path: str | None = None

    def __post_init__(self) -> None:
        if self.path is not None:
            if self.part is Part.MODULE and self.layer is not None:
                raise SiteError(f"a module path takes no layer, got {self.layer} for {self.path}")
            return
        if self.part is Part.MODULE:
            raise SiteError("a module site needs a path")
        if PARTS[self.part].per_layer != (self.layer is not None):
            raise SiteError(f"{self.part} {'needs' if PARTS[self.part].per_layer else 'takes no'} layer")

    def __str__(self) -> str:
        if self.part is Part.MODULE:
            return str(self.path)
        name = self.part.value if self.layer is None else f"{self.part.value}.{self.layer}"
        return name if self.path is None else f"{self.path}:{name}"

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
