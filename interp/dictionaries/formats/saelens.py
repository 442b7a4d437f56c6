"""SAELens folders: `cfg.json` and `sae_weights.safetensors`, as `sae_lens.SAE.load_from_disk` reads them (v6).

Written: architecture `topk`, with the input scale folded into the weights (its `expected_average_only_in` does nothing
at inference) and rows as they are (`rescale_acts_by_decoder_norm` false). Tensors: W_enc (d_in, d_sae), b_enc, W_dec
(d_sae, d_in), b_dec. Reading is strict: an architecture or an option that this package cannot honour, a missing key, a
wrong shape or a damaged file is an ArtefactError, never a silently different dictionary (their loader drops unknown
keys). A folder appears whole or not at all.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from interp.core.errors import ArtefactError, InterpError
from interp.core.sites import Site
from interp.dictionaries.activations.topk import TopK
from interp.dictionaries.dictionary import SparseDictionary

WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
FORMAT_VERSION = "6.54.12"
"""SAELens release whose format is written; below 6.0.0 their loader would rename keys."""
FIXED = {
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "rescale_acts_by_decoder_norm": False,
}
"""Options with the only value that a `SparseDictionary` computes."""


def save_saelens(
    sae: SparseDictionary, folder: Path | str, *, site: Site | None = None, metadata: Mapping[str, Any] | None = None
) -> Path:
    """Write a dictionary as a SAELens folder; an older dictionary there is replaced, other folders refused."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / CONFIG).is_file())):
        raise ArtefactError(f"{folder} exists and is not a saved dictionary; choose another folder")
    plain = sae.folded()
    tensors = {name: getattr(plain, name).detach().cpu().contiguous() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    described = {"sae_lens_version": FORMAT_VERSION, "prepend_bos": False} | dict(metadata or {})
    if site is not None:
        described |= {"hook_name": site.info.lens.format(layer=site.layer) if site.info.lens else str(site)}
    config = {
        "architecture": "topk",
        "d_in": plain.d_in,
        "d_sae": plain.d_dict,
        "k": _top_k(plain),
        "dtype": str(plain.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        **FIXED,
        "metadata": described,
    }
    draft = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}"
    try:
        draft.mkdir(parents=True)
        save_file(tensors, draft / WEIGHTS)
        (draft / CONFIG).write_text(json.dumps(config, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        draft.rename(folder)
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"could not write {folder}: {error}; free space or choose another folder") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def load_saelens(folder: Path | str) -> SparseDictionary:
    """Read a SAELens top-k folder. Rows rescaled by their norm are folded, so the latents are those of SAELens."""
    folder = Path(folder)
    config, tensors = _config(folder), _weights(folder)
    d_in, d_dict, k = (_positive(config, name, folder) for name in ("d_in", "d_sae", "k"))
    shapes = {"W_enc": (d_in, d_dict), "b_enc": (d_dict,), "W_dec": (d_dict, d_in), "b_dec": (d_in,)}
    if set(tensors) != set(shapes):
        raise ArtefactError(f"{folder / WEIGHTS} holds {sorted(tensors)}, a top-k dictionary has {sorted(shapes)}")
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise ArtefactError(f"{name} in {folder / WEIGHTS} is {tuple(tensors[name].shape)}, {CONFIG} says {shape}")
    try:
        sae = SparseDictionary(d_in, d_dict, TopK(k), dtype=tensors["W_dec"].dtype)
    except InterpError as error:
        raise ArtefactError(f"{folder / CONFIG}: {error}") from error
    with torch.no_grad():
        norms = tensors["W_dec"].norm(dim=1) if config["rescale_acts_by_decoder_norm"] else None
        sae.W_enc.copy_(tensors["W_enc"] if norms is None else tensors["W_enc"] * norms)
        sae.b_enc.copy_(tensors["b_enc"] if norms is None else tensors["b_enc"] * norms)
        sae.W_dec.copy_(tensors["W_dec"] if norms is None else tensors["W_dec"] / norms[:, None])
        sae.b_dec.copy_(tensors["b_dec"])
    return sae.requires_grad_(False)


def _top_k(sae: SparseDictionary) -> int:
    if not isinstance(sae.activation, TopK):
        raise InterpError(f"a {sae.activation.kind} dictionary cannot be written as top-k")
    return sae.activation.k


def _positive(config: Mapping[str, Any], name: str, folder: Path) -> int:
    value = config[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ArtefactError(f"{name}={value!r} in {folder / CONFIG} is not a positive whole number")
    return value


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise ArtefactError(f"{folder} is not a SAELens dictionary: it has no {CONFIG}")
    try:
        raw: object = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ArtefactError(f"{path} is damaged: {error}") from error
    if not isinstance(raw, dict):
        raise ArtefactError(f"{path} does not hold a JSON object")
    config = cast(dict[str, Any], raw)
    missing = [name for name in ("architecture", "d_in", "d_sae", "k", *FIXED) if name not in config]
    if config.get("architecture", "topk") != "topk":
        raise ArtefactError(f"{path}: architecture {config['architecture']!r} is not read here; only 'topk' is")
    if missing:
        raise ArtefactError(f"{path} lacks {', '.join(missing)}; is it a SAELens v6 file?")
    for name, expected in FIXED.items():
        if name != "rescale_acts_by_decoder_norm" and config[name] != expected:
            raise ArtefactError(f"{path}: {name}={config[name]!r} is not supported, expected {expected!r}")
    return config


def _weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise ArtefactError(f"{folder} has no {WEIGHTS}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"{path} is damaged: {error}") from error
