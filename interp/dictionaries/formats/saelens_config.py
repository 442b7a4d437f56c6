"""What a SAELens `cfg.json` says, of version 6 or older, read strictly.

Their loader drops unknown keys and answers None for missing ones; here an option that changes the numbers and cannot
be honoured is an ArtefactError. Older files (no `sae_lens_version`, or below 6) have everything on the top level and
other names: `hook_point`, `activation_fn_str` with `activation_fn_kwargs`, a boolean `normalize_activations`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from interp.core.errors import ArtefactError
from interp.dictionaries.dictionary import TokenNorm
from interp.dictionaries.formats.files import read_json
from interp.dictionaries.formats.parts import dtype_of, positive_int

CONFIG = "cfg.json"
SAE_ARCHITECTURES = ("standard", "topk", "abstopk", "jumprelu", "gated")
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
REFUSED = {
    "temporal": "its codes depend on earlier tokens through attention",
    "matching_pursuit": "its codes are found one after the other from the residual, not by an encoder",
    "batchtopk": "that is a training architecture; its inference save is 'jumprelu'",
    "matryoshka_batchtopk": "that is a training architecture; its inference save is 'jumprelu'",
}
"""Architectures of SAELens 6.54 that no `SparseDictionary` computes, and why."""
TOKEN_NORMS: Mapping[str, TokenNorm] = {
    "none": "none", "layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm",
}  # fmt: skip
TOP_K = ("topk", "abstopk")


@dataclass(frozen=True, kw_only=True)
class SaeLensConfig:
    """One `cfg.json`, checked."""

    architecture: str
    d_in: int
    d_out: int
    d_dict: int
    dtype: torch.dtype
    subtract_b_dec: bool
    token_norm: TokenNorm
    expected_average: bool
    """Trained on inputs times sqrt(d_in) / mean |x|; that factor is not in the file."""
    hook_z: bool
    """The dictionary reads all heads of `z` side by side."""
    k: int | None
    rescaled: bool
    """Top-k is chosen by z |d_i|, and codes are multiplied by |d_i|."""
    finetuned: bool
    """Old files: codes are multiplied by a `scaling_factor` before decoding."""
    metadata: Mapping[str, Any]


def read_config(path: Path) -> SaeLensConfig:
    """A config of any version."""
    raw = read_json(path)
    metadata = raw.get("metadata")
    metadata = cast("dict[str, Any]", metadata) if isinstance(metadata, dict) else {}
    version = raw.get("sae_lens_version") or metadata.get("sae_lens_version")
    legacy = not version or _major(str(version)) < 6
    if legacy:
        raw, metadata = _modern(raw, path)
    architecture = str(raw.get("architecture", "missing"))
    if architecture not in SAE_ARCHITECTURES + TRANSCODERS:
        why = REFUSED.get(architecture, f"known are {', '.join(SAE_ARCHITECTURES + TRANSCODERS)}")
        raise ArtefactError(f"{path}: architecture {architecture!r} is not read here: {why}")
    _present(raw, ("d_in", "d_sae", *(("k",) if architecture in TOP_K else ())), path)
    if not legacy:
        _present(raw, ("apply_b_dec_to_input", "normalize_activations", "reshape_activations"), path)
    d_in = positive_int(raw["d_in"], "d_in", path)
    transcodes = architecture in TRANSCODERS
    norm = raw["normalize_activations"]
    if norm not in (*TOKEN_NORMS, "expected_average_only_in"):
        known = ", ".join((*TOKEN_NORMS, "expected_average_only_in"))
        raise ArtefactError(f"{path}: normalize_activations={norm!r} is not read here; known are {known}")
    if transcodes and norm != "none":
        raise ArtefactError(f"{path}: normalize_activations={norm!r} of a transcoder says nothing about its output")
    subtract = raw["apply_b_dec_to_input"]
    if not isinstance(subtract, bool):
        raise ArtefactError(f"{path}: apply_b_dec_to_input={subtract!r} is neither true nor false")
    if raw["reshape_activations"] not in ("none", "hook_z"):
        raise ArtefactError(f"{path}: reshape_activations={raw['reshape_activations']!r}, expected 'none' or 'hook_z'")
    return SaeLensConfig(
        architecture=architecture,
        d_in=d_in,
        d_out=positive_int(raw.get("d_out"), "d_out", path) if transcodes else d_in,
        d_dict=positive_int(raw["d_sae"], "d_sae", path),
        dtype=dtype_of(raw.get("dtype", "float32"), path),
        subtract_b_dec=subtract and not transcodes,
        token_norm=TOKEN_NORMS.get(str(norm), "none"),
        expected_average=norm == "expected_average_only_in",
        hook_z=raw["reshape_activations"] == "hook_z",
        k=positive_int(raw["k"], "k", path) if architecture in TOP_K else None,
        rescaled=bool(raw.get("rescale_acts_by_decoder_norm", False)) and architecture in TOP_K,
        finetuned=bool(raw.get("finetuning_scaling_factor", False)),
        metadata=metadata,
    )


def _modern(raw: dict[str, Any], path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """An older config under the names of version 6, and its metadata."""
    renamed = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn": None}
    new = {renamed.get(name) or name: value for name, value in raw.items()}
    function = new.get("activation_fn_str") or new.get("activation_fn") or "relu"
    kwargs = cast("dict[str, Any]", new.get("activation_fn_kwargs") or {})
    new.setdefault("architecture", "standard")
    if function == "topk":
        new |= {"architecture": "topk", "k": kwargs.get("k", new.get("k"))}
    elif function != "relu":
        raise ArtefactError(f"{path}: activation_fn {function!r} is not read here; known are relu and topk")
    norm = new.get("normalize_activations")
    if norm is None or isinstance(norm, bool):
        new["normalize_activations"] = "expected_average_only_in" if norm else "none"
    new.setdefault("apply_b_dec_to_input", True)
    hook = str(new.get("hook_name") or "")
    new.setdefault("reshape_activations", "hook_z" if "hook_z" in hook else "none")
    facts = ("model_name", "hook_name", "hook_name_out", "hook_head_index", "prepend_bos", "context_size",
             "dataset_path", "model_from_pretrained_kwargs", "neuronpedia_id")  # fmt: skip
    return new, {name: new[name] for name in facts if name in new}


def _present(raw: Mapping[str, Any], names: tuple[str, ...], path: Path) -> None:
    missing = [name for name in names if name not in raw]
    if missing:
        raise ArtefactError(f"{path} lacks {', '.join(missing)}; is it a SAELens file?")


def _major(version: str) -> int:
    head = version.partition(".")[0]
    return int(head) if head.isdecimal() else 0
