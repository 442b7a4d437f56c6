"""One safetensors file: W_enc (d_in, m), b_enc (m), W_dec (m, d_out), b_dec (d_out).

Also threshold (m), W_skip (d_in, d_out), r_mag and b_mag (m) where the kind has them. Scales are folded in. The header
says the rest under `interp`: activation and its settings, whether b_dec is subtracted, token_norm, what is known about
it. A bare file of somebody else has no such header: then the caller says what it is (`Hints`), as far as `k`,
`activation` or `threshold` in the header do not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import ArtefactError, InterpError, unknown
from interp.dictionaries.activations.base import Activation
from interp.dictionaries.activations.batch_topk import BatchTopK
from interp.dictionaries.activations.table import ACTIVATIONS, rebuild
from interp.dictionaries.dictionary import SparseDictionary
from interp.dictionaries.formats.files import publish, read_header, read_tensors, write_tensors
from interp.dictionaries.formats.orientation import Turned, choose, possible
from interp.dictionaries.formats.parts import Parts, assemble, check_tensors, take_apart
from interp.dictionaries.saved import SavedDictionary

REQUIRED = ("W_enc", "b_enc", "W_dec", "b_dec")
OPTIONAL = ("threshold", "W_skip", "r_mag", "b_mag")
SUFFIX = ".safetensors"


@dataclass(frozen=True, kw_only=True, eq=False)
class Hints:
    """What a file does not say about the dictionary in it; None where it does."""

    layer: int | None = None
    """circuit-tracer folders: which layer."""
    kind: str | None = None
    """dictionary_learning files without a config: the class."""
    input_scale: float | None = None
    """SAELens files trained with expected_average_only_in: sqrt(d_in) / mean |x|."""
    activation: str | None = None
    """Bare files: relu, topk, jump_relu, batch_topk, ..."""
    k: int | None = None
    """Bare files: active latents per token."""
    threshold: float | None = None
    """Bare files: batch_topk, the threshold."""
    subtract_b_dec: bool | None = None
    """Bare files: whether b_dec is subtracted from the input."""
    turned: Turned | None = None
    """Bare files with as many latents as dimensions: whether W_enc, and W_dec, lie the other way round."""
    sample: Float[Tensor, "n d_in"] | None = None
    """Activations from which the orientation is found instead."""


def write(saved: SavedDictionary, path: Path | str) -> Path:
    """Write any dictionary as one file."""
    path = Path(path)
    if path.suffix != SUFFIX:
        raise InterpError(f"{path} should end in {SUFFIX}: a plain dictionary is one such file")
    made = saved.dictionary
    parts = take_apart(made)
    names = (*REQUIRED, *OPTIONAL)
    tensors = {name: value for name in names if (value := getattr(parts, name)) is not None}
    known = {
        "activation": made.activation.kind,
        "settings": dict(made.activation.settings()),
        "subtract_b_dec": parts.subtract_b_dec,
        "token_norm": parts.token_norm,
        "about": dict(saved.about),
        "certificate": None if saved.certificate is None else dict(saved.certificate),
    }
    header = {"format": "pt", "interp": json.dumps(known, allow_nan=False)}
    return publish(path, lambda draft: write_tensors(draft, tensors, header), replaces=is_plain)


def is_plain(path: Path) -> bool:
    """Whether the file has the tensors of a dictionary, in any orientation."""
    if not path.is_file() or path.suffix != SUFFIX:
        return False
    names = set(read_header(path)[0])
    return set(REQUIRED) <= names <= {*REQUIRED, *OPTIONAL}


def is_ours(path: Path) -> bool:
    """Whether the header of the file says everything."""
    return is_plain(path) and "settings" in read_own(path)


def read_own(path: Path) -> dict[str, Any]:
    """What our header holds; empty for other files."""
    text = read_header(path)[1].get("interp")
    try:
        own: object = json.loads(text) if text else {}
    except json.JSONDecodeError as error:
        raise ArtefactError(f"the header of {path} is damaged: {error}") from error
    return cast("dict[str, Any]", own) if isinstance(own, dict) else {}


def read(path: Path | str, hints: Hints | None = None) -> SavedDictionary:
    """The dictionary in a file."""
    path, hints = Path(path), hints or Hints()
    tensors, own = read_tensors(path), read_own(path)
    missing = [name for name in REQUIRED if name not in tensors]
    if missing:
        raise ArtefactError(f"{path} holds {sorted(tensors)}, and lacks {', '.join(missing)}")
    if "settings" in own:
        activation = rebuild(str(own["activation"]), len(tensors["b_enc"]), own["settings"])
        made = _build(tensors, (False, False), activation, bool(own["subtract_b_dec"]), own["token_norm"], path)
        about = {"source": f"plain {own['activation']}"} | dict(own["about"])
        return SavedDictionary(dictionary=made, about=about, certificate=own["certificate"], path=path)
    made = _bare(tensors, path, hints)
    return SavedDictionary(dictionary=made, about={"source": f"plain {made.activation.kind}"}, path=path)


def _bare(tensors: Mapping[str, Tensor], path: Path, hints: Hints) -> SparseDictionary:
    header = read_header(path)[1]
    hints = _filled(hints, header, path)
    d_dict, d_out = len(tensors["b_enc"]), len(tensors["b_dec"])
    activation = _activation(hints, tensors, d_dict, path)
    ways = possible(tensors["W_enc"], tensors["b_enc"], tensors["W_dec"], tensors["b_dec"], path)
    if hints.turned is not None:
        if hints.turned not in ways:
            raise ArtefactError(f"{path}: turned={hints.turned} does not fit the shapes; possible are {ways}")
        ways = [hints.turned]
    subtract = hints.subtract_b_dec
    if subtract is None:
        W_enc = tensors["W_enc"]
        if W_enc.numel() // d_dict == d_out:
            raise ArtefactError(f"{path} does not say whether b_dec is subtracted from the input; pass subtract_b_dec=")
        subtract = False

    def build(way: Turned) -> SparseDictionary:
        return _build(tensors, way, activation, subtract, "none", path)

    return build(choose(ways, build, path, hints.sample))


def _build(
    tensors: Mapping[str, Tensor], way: Turned, activation: Activation, subtract: bool, token_norm: Any, path: Path
) -> SparseDictionary:
    W_enc = tensors["W_enc"].t() if way[0] else tensors["W_enc"]
    W_dec = tensors["W_dec"].t() if way[1] else tensors["W_dec"]
    d_in, m = W_enc.shape
    shapes: dict[str, tuple[int, ...]] = {name: tuple(tensors[name].shape) for name in ("W_enc", "b_dec", "W_dec")}
    shapes |= {name: (m,) for name in ("b_enc", "threshold", "r_mag", "b_mag") if name in tensors}
    shapes |= {"W_skip": (d_in, W_dec.shape[1])} if "W_skip" in tensors else {}
    if W_dec.shape[0] != m:
        raise ArtefactError(f"{path}: W_enc has {m} latents and W_dec {W_dec.shape[0]}")
    check_tensors(tensors, shapes, path, what="a dictionary", says="W_enc")
    threshold = tensors.get("threshold")
    if isinstance(activation, BatchTopK) and threshold is not None:
        if bool((threshold != threshold[0]).any()):
            raise ArtefactError(f"{path}: a batch top-k dictionary has one threshold for all latents")
        activation.threshold.fill_(float(threshold[0]))
    parts = Parts(
        W_enc=W_enc, b_enc=tensors["b_enc"], W_dec=W_dec, b_dec=tensors["b_dec"], activation=activation,
        threshold=threshold, r_mag=tensors.get("r_mag"), b_mag=tensors.get("b_mag"), W_skip=tensors.get("W_skip"),
        subtract_b_dec=subtract, token_norm=token_norm,
    )  # fmt: skip
    return assemble(parts, path)


def _filled(hints: Hints, header: Mapping[str, str], path: Path) -> Hints:
    """Hints completed by a foreign header."""
    try:
        k = int(header["k"]) if hints.k is None and "k" in header else hints.k
        threshold = float(header["threshold"]) if hints.threshold is None and "threshold" in header else hints.threshold
    except ValueError as error:
        raise ArtefactError(f"the header of {path}: {error}") from error
    return replace(hints, k=k, threshold=threshold, activation=hints.activation or header.get("activation"))


def _activation(hints: Hints, tensors: Mapping[str, Tensor], d_dict: int, path: Path) -> Activation:
    kind = hints.activation
    if kind is None:
        kind = "jump_relu" if "threshold" in tensors else "gated" if "r_mag" in tensors else None
        kind = kind or ("topk" if hints.k is not None and hints.threshold is None else None)
    if kind is None:
        raise ArtefactError(f"{path} does not say what makes its codes sparse; pass activation= and k=, or threshold=")
    if kind not in ACTIVATIONS:
        raise unknown("activation", kind, ACTIVATIONS)
    if ("threshold" in tensors) != (kind == "jump_relu") or ("r_mag" in tensors) != (kind == "gated"):
        raise ArtefactError(f"{path} holds {sorted(tensors)}, which is no {kind} dictionary")
    needs_k = kind in ("topk", "batch_topk", "group_max", "gradient_topk")
    if needs_k and hints.k is None:
        raise ArtefactError(f"{path} does not say how many latents are active; pass k=")
    made = rebuild(kind, d_dict, {"k": hints.k} if needs_k else {})
    if isinstance(made, BatchTopK):
        if hints.threshold is None:
            raise ArtefactError(f"{path} does not say the threshold of its batch top-k; pass threshold=")
        made.threshold.copy_(torch.tensor(hints.threshold, dtype=torch.float64))
    return made
