"""circuit-tracer's transcoders: one `layer_<i>.safetensors` per layer, `config.yaml` beside them.

Tensors: W_enc (m, d), W_dec (m, d), b_enc (m), b_dec (d), and `activation_function.threshold` (m) for a JumpReLU,
W_skip (d, d) used as x W_skip^T. Nothing is subtracted from the input: b_dec of an autoencoder moves into b_enc.
Their JumpReLU is z 1[z > threshold] without a ReLU, so thresholds below 0 are refused. The file has no place for k: a
top-k dictionary would be run as a ReLU, and is refused. W_enc lies transposed to SAELens' files; where m = d its shape
does not say so, the name of the format does. The certificate goes into the header of the file.
Source: https://github.com/safety-research/circuit-tracer, transcoder/single_layer_transcoder.py. A cross-layer
transcoder has files of its own (`formats.cross_layer`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import yaml
from torch import Tensor

from interp.core.errors import ArtefactError, InterpError
from interp.dictionaries.activations.jump_relu import JumpReLU
from interp.dictionaries.activations.relu import ReLU
from interp.dictionaries.formats.files import publish, read_header, read_tensors, write_tensors
from interp.dictionaries.formats.hooks import lens_of_site, site_of_lens
from interp.dictionaries.formats.parts import Parts, assemble, check_tensors, take_apart
from interp.dictionaries.saved import SavedDictionary

CONFIG, THRESHOLD = "config.yaml", "activation_function.threshold"
LAYER = re.compile(r"layer_(\d+)\.safetensors")
CLT = re.compile(r"W_(enc|dec)_(\d+)\.safetensors")
SUFFIX = ".safetensors"
REQUIRED = ("W_enc", "W_dec", "b_enc", "b_dec")


def read(path: Path | str, *, layer: int | None = None) -> SavedDictionary:
    """The transcoder in a file, or that of one layer in a folder."""
    path = Path(path)
    if path.is_dir():
        found = layers(path)
        if layer is None and len(found) != 1:
            raise ArtefactError(f"{path} holds transcoders of {len(found)} layers; say which, layer=0 to {max(found)}")
        chosen = next(iter(found)) if layer is None else layer
        if chosen not in found:
            raise ArtefactError(f"{path} has no layer {chosen}; it has {sorted(found)}")
        path = found[chosen]
    tensors = read_tensors(path)
    return SavedDictionary(
        dictionary=assemble(_parts(tensors, path), path), about=_about(path), certificate=_own(path).get("certificate"),
        path=path,
    )  # fmt: skip


def read_set(folder: Path | str) -> dict[int, SavedDictionary]:
    """Every layer of a folder."""
    return {layer: read(path) for layer, path in sorted(layers(Path(folder)).items())}


def write(saved: SavedDictionary, path: Path | str) -> Path:
    """Write one transcoder as a file. Raises InterpError where circuit-tracer has no such kind."""
    path = Path(path)
    made, about = saved.dictionary, saved.about
    if path.suffix != SUFFIX:
        raise InterpError(f"{path} should end in {SUFFIX}: circuit-tracer keeps one file per layer, layer_<i>{SUFFIX}")
    if made.activation.kind not in ("relu", "jump_relu", "batch_topk"):
        raise InterpError(
            f"circuit-tracer's files hold relu and jump_relu transcoders; a {made.activation.kind} one would be run "
            "as a relu"
        )
    if made.d_in != made.d_out:
        raise InterpError(f"circuit-tracer's transcoders have one width, this has {made.d_in} and {made.d_out}")
    if made.token_norm != "none":
        raise InterpError(f"circuit-tracer does not normalise tokens, token_norm={made.token_norm!r} would be lost")
    parts = take_apart(made, subtract=False)
    tensors = {
        "W_enc": parts.W_enc.t().contiguous(), "W_dec": parts.W_dec, "b_enc": parts.b_enc, "b_dec": parts.b_dec,
    }  # fmt: skip
    if parts.threshold is not None:
        tensors[THRESHOLD] = parts.threshold
    if parts.W_skip is not None:
        tensors["W_skip"] = parts.W_skip.t().contiguous()
    known = {name: about[name] for name in ("model", "weight_hash", "site", "target_site") if about.get(name)}
    if saved.certificate is not None:
        known["certificate"] = dict(saved.certificate)
    header = {"format": "pt"} | ({"interp": json.dumps(known, allow_nan=False)} if known else {})
    return publish(path, lambda draft: write_tensors(draft, tensors, header), replaces=is_transcoder)


def write_set(saved: Mapping[int, SavedDictionary], folder: Path | str, *, scan: str | None = None) -> Path:
    """Write transcoders of consecutive layers from 0 and the `config.yaml` that circuit-tracer asks for."""
    if sorted(saved) != list(range(len(saved))) or not saved:
        raise InterpError(f"circuit-tracer wants every layer from 0, got {sorted(saved)}")
    widths = {item.dictionary.d_dict for item in saved.values()}
    if len(widths) != 1:
        raise InterpError(f"circuit-tracer wants one number of latents for all layers, got {sorted(widths)}")
    hooks = {_hook(item, "site", "hook_resid_mid") + "|" + _hook(item, "target_site", "hook_mlp_out")
             for item in saved.values()}  # fmt: skip
    if len(hooks) != 1:
        raise InterpError(f"all layers must read and write the same points, got {sorted(hooks)}")
    read_at, written_at = hooks.pop().split("|")
    config = {
        "model_kind": "transcoder_set",
        "feature_input_hook": read_at,
        "feature_output_hook": written_at,
        "model_name": saved[0].about.get("model"),
        "scan": scan,
    }

    def fill(draft: Path) -> None:
        draft.mkdir()
        for layer, item in saved.items():
            write(item, draft / f"layer_{layer}{SUFFIX}")
        (draft / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")

    return publish(Path(folder), fill, replaces=lambda there: there.is_dir() and bool(layers(there)))


def layers(folder: Path) -> dict[int, Path]:
    """Transcoder files of a folder by layer."""
    return {int(name[1]): path for path in sorted(folder.iterdir()) if (name := LAYER.fullmatch(path.name))}


def is_cross_layer(folder: Path) -> bool:
    """Whether the folder holds a cross-layer transcoder."""
    return any(CLT.fullmatch(path.name) for path in folder.iterdir())


def is_transcoder(path: Path) -> bool:
    """Whether the file has the tensors of a transcoder, W_enc with one latent per row."""
    if not path.is_file() or path.suffix != SUFFIX:
        return False
    shapes, _ = read_header(path)
    if not set(REQUIRED) <= set(shapes) <= {*REQUIRED, THRESHOLD, "W_skip"}:
        return False
    return shapes["W_enc"] == shapes["W_dec"] == (*shapes["b_enc"], *shapes["b_dec"])


def _parts(tensors: Mapping[str, Tensor], path: Path) -> Parts:
    missing = [name for name in REQUIRED if name not in tensors or tensors[name].ndim != (2 if name[0] == "W" else 1)]
    if missing:
        raise ArtefactError(f"{path} is no transcoder: {', '.join(missing)} missing or of another rank")
    m, d = len(tensors["b_enc"]), len(tensors["b_dec"])
    optional = {THRESHOLD: (m,), "W_skip": (d, d)}
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (m, d), "W_dec": (m, d), "b_enc": (m,), "b_dec": (d,)}
    shapes |= {name: shape for name, shape in optional.items() if name in tensors}
    check_tensors(tensors, shapes, path, what="a transcoder", says="its biases")
    threshold = tensors.get(THRESHOLD)
    if threshold is not None and bool((threshold < 0).any()):
        raise ArtefactError(f"{path}: thresholds below 0 let negative codes through; they are not read here")
    return Parts(
        W_enc=tensors["W_enc"].t(), b_enc=tensors["b_enc"], W_dec=tensors["W_dec"], b_dec=tensors["b_dec"],
        activation=ReLU() if threshold is None else JumpReLU(m), threshold=threshold,
        W_skip=tensors["W_skip"].t() if "W_skip" in tensors else None, subtract_b_dec=False,
    )  # fmt: skip


def _own(path: Path) -> dict[str, Any]:
    text = read_header(path)[1].get("interp")
    try:
        own: object = json.loads(text) if text else {}
    except json.JSONDecodeError as error:
        raise ArtefactError(f"the header of {path} is damaged: {error}") from error
    return cast("dict[str, Any]", own) if isinstance(own, dict) else {}


def _about(path: Path) -> dict[str, Any]:
    own, config = _own(path), read_config(path.parent)
    number = LAYER.fullmatch(path.name)
    about: dict[str, Any] = {
        "source": "circuit-tracer transcoder",
        "model": own.get("model") or config.get("model_name"),
        "weight_hash": own.get("weight_hash"),
        "layer": int(number[1]) if number else None,
    }
    for name, key in (("site", "feature_input_hook"), ("target_site", "feature_output_hook")):
        hook = config.get(key)
        about[name] = own.get(name) or (site_of_lens(f"blocks.{number[1]}.{hook}") if number and hook else None)
    return {name: value for name, value in about.items() if value is not None}


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.yaml` of a folder; empty without one."""
    if not (folder / CONFIG).is_file():
        return {}
    try:
        raw: object = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ArtefactError(f"{folder / CONFIG} is damaged: {error}") from error
    return cast("dict[str, Any]", raw) if isinstance(raw, dict) else {}


def _hook(saved: SavedDictionary, name: str, default: str) -> str:
    lens = lens_of_site(saved.about.get(name))
    return re.sub(r"^blocks\.\d+\.", "", lens) if lens else default
