"""circuit-tracer's cross-layer transcoders: `W_enc_<i>.safetensors` and `W_dec_<i>.safetensors` for each of L layers.

W_enc_<i>: W_enc_<i> (m, d), b_enc_<i> (m), b_dec_<i> (d), and threshold_<i> (m) for a JumpReLU.
W_dec_<i>: W_dec_<i> (m, L - i, d), what each latent writes to its own layer and to all later ones.
A `CrossLayerTranscoder` keeps the same as one `SparseDictionary` per layer, with the last two axes side by side and all
output biases in the first. Skip paths are refused: circuit-tracer's class has them, its files do not. As in
`circuit_tracer`, a top-k would be run as a ReLU, and a threshold below 0 lets negative codes through.
Source: https://github.com/safety-research/circuit-tracer, transcoder/cross_layer_transcoder.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from interp.core.errors import ArtefactError, InterpError
from interp.dictionaries.activations.jump_relu import JumpReLU
from interp.dictionaries.activations.relu import ReLU
from interp.dictionaries.cross_layer import CrossLayerTranscoder
from interp.dictionaries.dictionary import SparseDictionary
from interp.dictionaries.formats.circuit_tracer import CLT, CONFIG, read_config
from interp.dictionaries.formats.files import publish, read_tensors, write_tensors
from interp.dictionaries.formats.parts import Parts, assemble, check_tensors, take_apart

HOOKS = ("hook_resid_mid", "hook_mlp_out")
"""Where circuit-tracer reads and writes by default, within each block."""


def read_clt(folder: Path | str) -> tuple[CrossLayerTranscoder, Mapping[str, Any]]:
    """The transcoder of a folder, and what its `config.yaml` says (empty without one)."""
    folder = Path(folder)
    layers = _layers(folder)
    parts: list[SparseDictionary] = []
    biases: list[Tensor] = []
    for layer in range(layers):
        encoder, decoder = folder / f"W_enc_{layer}.safetensors", folder / f"W_dec_{layer}.safetensors"
        found = {name.removesuffix(f"_{layer}"): value for name, value in read_tensors(encoder).items()}
        rows = read_tensors(decoder).get(f"W_dec_{layer}")
        if "W_enc" not in found or found["W_enc"].ndim != 2:
            raise ArtefactError(f"{encoder} holds no matrix W_enc_{layer}")
        m, d = found["W_enc"].shape
        shapes: dict[str, tuple[int, ...]] = {"W_enc": (m, d), "b_enc": (m,), "b_dec": (d,)}
        shapes |= {"threshold": (m,)} if "threshold" in found else {}
        check_tensors(found, shapes, encoder, what="a layer", says="its encoder")
        if rows is None:
            raise ArtefactError(f"{decoder} holds no W_dec_{layer}")
        check_tensors({"W_dec": rows}, {"W_dec": (m, layers - layer, d)}, decoder, what="a layer", says="its encoder")
        biases.append(found["b_dec"])
        parts.append(_part(found, rows, encoder))
    with torch.no_grad():
        parts[0].b_dec.copy_(torch.cat(biases))
    try:
        return CrossLayerTranscoder(parts), read_config(folder)
    except InterpError as error:
        raise ArtefactError(f"{folder}: {error}") from error


def write_clt(
    clt: CrossLayerTranscoder,
    folder: Path | str,
    *,
    hooks: tuple[str, str] = HOOKS,
    model: str | None = None,
    scan: str | None = None,
) -> Path:
    """Write a folder that circuit-tracer's `load_clt` reads. Raises InterpError where it has no such kind."""
    last = clt.parts[-1]
    kind = last.activation.kind
    if kind not in ("relu", "jump_relu", "batch_topk"):
        raise InterpError(f"circuit-tracer's files hold relu and jump_relu; a {kind} one would be run as a relu")
    if any(part.W_skip is not None for part in clt.parts):
        raise InterpError("circuit-tracer's files of cross-layer transcoders have no skip path")
    if last.d_in != last.d_out:
        raise InterpError(f"circuit-tracer's transcoders have one width, this has {last.d_in} and {last.d_out}")
    taken = [take_apart(part) for part in clt.parts]
    d = last.d_out
    bias = torch.zeros(clt.n_layers, d, dtype=torch.float64)
    for layer, parts in enumerate(taken):
        bias[layer:] += parts.b_dec.double().unflatten(0, (-1, d))
    config = {
        "model_kind": "cross_layer_transcoder", "feature_input_hook": hooks[0], "feature_output_hook": hooks[1],
        "model_name": model, "scan": scan,
    }  # fmt: skip

    def fill(draft: Path) -> None:
        draft.mkdir()
        for layer, parts in enumerate(taken):
            encoder = {
                "W_enc": parts.W_enc.t().contiguous(), "b_enc": parts.b_enc,
                "b_dec": bias[layer].to(parts.b_dec.dtype).contiguous(),
            }  # fmt: skip
            if parts.threshold is not None:
                encoder["threshold"] = parts.threshold
            named = {f"{name}_{layer}": value for name, value in encoder.items()}
            write_tensors(draft / f"W_enc_{layer}.safetensors", named)
            rows = parts.W_dec.unflatten(1, (-1, d)).contiguous()
            write_tensors(draft / f"W_dec_{layer}.safetensors", {f"W_dec_{layer}": rows})
        (draft / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")

    return publish(Path(folder), fill, replaces=lambda there: there.is_dir() and _holds_layers(there))


def _part(found: Mapping[str, Tensor], rows: Tensor, path: Path) -> SparseDictionary:
    threshold = found.get("threshold")
    if threshold is not None and bool((threshold < 0).any()):
        raise ArtefactError(f"{path}: thresholds below 0 let negative codes through; they are not read here")
    W_dec = rows.flatten(1)
    parts = Parts(
        W_enc=found["W_enc"].t(), b_enc=found["b_enc"], W_dec=W_dec, b_dec=W_dec.new_zeros(W_dec.shape[1]),
        activation=ReLU() if threshold is None else JumpReLU(len(rows)), threshold=threshold, subtract_b_dec=False,
    )  # fmt: skip
    return assemble(parts, path)


def _holds_layers(folder: Path) -> bool:
    return not any(folder.iterdir()) or any(CLT.fullmatch(path.name) for path in folder.iterdir())


def _layers(folder: Path) -> int:
    names = [found for path in folder.iterdir() if (found := CLT.fullmatch(path.name))] if folder.is_dir() else []
    encoders, decoders = ({int(name[2]) for name in names if name[1] == side} for side in ("enc", "dec"))
    if not encoders or encoders != decoders or encoders != set(range(len(encoders))):
        raise ArtefactError(
            f"{folder} holds encoders of layers {sorted(encoders)} and decoders of {sorted(decoders)}, expected both "
            "of every layer from 0"
        )
    return len(encoders)
