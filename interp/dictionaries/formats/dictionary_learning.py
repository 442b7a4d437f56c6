"""dictionary_learning folders: `ae.pt`, and `config.json` that names the class.

class                    tensors (m latents of width d)
AutoEncoder              encoder.weight (m, d), encoder.bias, decoder.weight (d, m), bias (d), subtracted
AutoEncoderNew           encoder.weight, encoder.bias, decoder.weight, decoder.bias: nothing is subtracted
AutoEncoderTopK          encoder.weight, encoder.bias, decoder.weight, b_dec, k, threshold (not used by top-k)
BatchTopKSAE             the same names; the codes are those above the threshold
GatedAutoEncoder         encoder.weight, decoder.weight, decoder_bias, r_mag, gate_bias, mag_bias
JumpReluAutoEncoder      W_enc (d, m), b_enc, W_dec (m, d), b_dec (not subtracted), threshold (m)
MatryoshkaBatchTopKSAE   W_enc, b_enc, W_dec, b_dec, k, threshold, group_sizes
Read only, since the file is a pickle: with torch.load(weights_only=True), which builds tensors and plain containers and
refuses anything else. Their files fit raw activations: the normalisation of training is scaled into the biases before
saving. `AutoEncoder.from_pretrained` makes rows unit by default; here they are as in the file (`unit_rows()` does it).
Source: https://github.com/saprmarks/dictionary_learning, dictionary.py and trainers/.
"""

from __future__ import annotations

import pickle  # noqa: TID251 - for the name of the error that the restricted reader raises
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from interp.core.errors import ArtefactError
from interp.dictionaries.activations.base import Activation
from interp.dictionaries.activations.batch_topk import BatchTopK
from interp.dictionaries.activations.gated import Gated
from interp.dictionaries.activations.jump_relu import JumpReLU
from interp.dictionaries.activations.relu import ReLU
from interp.dictionaries.activations.topk import TopK
from interp.dictionaries.formats.files import read_json
from interp.dictionaries.formats.parts import Parts, assemble, check_tensors
from interp.dictionaries.saved import SavedDictionary

WEIGHTS, CONFIG = "ae.pt", "config.json"
LINEAR = ("encoder.weight", "decoder.weight")
PLAIN = ("W_enc", "W_dec", "b_enc", "b_dec")
TENSORS = {
    "AutoEncoder": (*LINEAR, "encoder.bias", "bias"),
    "AutoEncoderNew": (*LINEAR, "encoder.bias", "decoder.bias"),
    "AutoEncoderTopK": (*LINEAR, "encoder.bias", "b_dec", "k", "threshold"),
    "BatchTopKSAE": (*LINEAR, "encoder.bias", "b_dec", "k", "threshold"),
    "GatedAutoEncoder": (*LINEAR, "decoder_bias", "r_mag", "gate_bias", "mag_bias"),
    "JumpReluAutoEncoder": (*PLAIN, "threshold"),
    "MatryoshkaBatchTopKSAE": (*PLAIN, "k", "threshold", "group_sizes"),
}
"""Class -> names of its tensors. Older top-k files lack the threshold."""
UNSUBTRACTED = ("AutoEncoderNew", "JumpReluAutoEncoder")


def read(path: Path | str, *, kind: str | None = None) -> SavedDictionary:
    """The dictionary in `ae.pt` or in its folder. `kind` is the class, where there is no config and the names do not
    say (top-k and batch top-k)."""
    path = Path(path)
    path = path / WEIGHTS if path.is_dir() else path
    config = read_json(path.parent / CONFIG) if (path.parent / CONFIG).is_file() else {}
    trainer = config.get("trainer")
    trainer = cast("dict[str, Any]", trainer) if isinstance(trainer, dict) else {}
    tensors = _tensors(path)
    name = _class(kind or trainer.get("dict_class"), tensors, path)
    facts = {
        "source": f"dictionary_learning {name}",
        "model": trainer.get("lm_name"),
        "layer": trainer.get("layer"),
        "submodule": trainer.get("submodule_name"),
    }
    about = {key: value for key, value in facts.items() if value is not None}
    return SavedDictionary(dictionary=assemble(_parts(name, tensors, path), path), about=about, path=path.parent)


def _tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ArtefactError(f"{path.parent} has no {path.name}")
    try:
        # weights_only runs no code of the file: it builds tensors and plain containers, and raises on anything else.
        raw: object = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
    except pickle.UnpicklingError as error:
        raise ArtefactError(
            f"{path} is damaged, or holds more than tensors and would have to run code; it is not read"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise ArtefactError(f"{path} is damaged: {error}") from error
    state = cast("dict[object, object]", raw) if isinstance(raw, Mapping) else {}
    if not state or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()):
        raise ArtefactError(f"{path} does not hold a state dict of tensors")
    return cast("dict[str, Tensor]", dict(state))


def _class(named: object, tensors: Mapping[str, Tensor], path: Path) -> str:
    names = set(tensors)
    fits = [name for name, own in TENSORS.items() if set(own) - {"threshold"} <= names <= set(own)]
    if named is None:
        if len(fits) == 1:
            return fits[0]
        found = f"{sorted(names)}; it could be {' or '.join(fits) or 'none of ' + ', '.join(TENSORS)}"
        raise ArtefactError(f"{path} has no {CONFIG} beside it and holds {found}; pass kind=")
    if named not in TENSORS:
        raise ArtefactError(f"{path}: class {named!r} is not read here; known are {', '.join(TENSORS)}")
    if named not in fits:
        raise ArtefactError(f"{path} holds {sorted(names)}, a {named} has {sorted(TENSORS[str(named)])}")
    return str(named)


def _parts(name: str, tensors: Mapping[str, Tensor], path: Path) -> Parts:
    linear = "encoder.weight" in tensors
    encoder, decoder = (tensors[key] for key in (LINEAR if linear else ("W_enc", "W_dec")))
    if encoder.ndim != 2:
        raise ArtefactError(f"{path}: the encoder is {tuple(encoder.shape)}, expected a matrix")
    m, d = encoder.shape if linear else reversed(encoder.shape)
    weights = {key: value for key, value in tensors.items() if key not in ("k", "group_sizes")}
    if name not in ("JumpReluAutoEncoder",):
        weights.pop("threshold", None)
    wide = {"encoder.weight": (m, d), "decoder.weight": (d, m), "W_enc": (d, m), "W_dec": (m, d)}
    outputs = ("bias", "b_dec", "decoder.bias", "decoder_bias")
    shapes = {key: wide.get(key, (d,) if key in outputs else (m,)) for key in weights}
    check_tensors(weights, shapes, path, what=f"a {name}", says="its encoder")
    zeros = encoder.new_zeros(m)
    return Parts(
        W_enc=encoder.t() if linear else encoder,
        b_enc=next((weights[key] for key in ("encoder.bias", "gate_bias", "b_enc") if key in weights), zeros),
        W_dec=decoder.t() if linear else decoder,
        b_dec=next(weights[key] for key in outputs if key in weights),
        activation=_activation(name, tensors, m, path), threshold=weights.get("threshold"),
        r_mag=weights.get("r_mag"), b_mag=weights.get("mag_bias"), subtract_b_dec=name not in UNSUBTRACTED,
    )  # fmt: skip


def _activation(name: str, tensors: Mapping[str, Tensor], d_dict: int, path: Path) -> Activation:
    if name == "JumpReluAutoEncoder":
        return JumpReLU(d_dict)
    if name == "GatedAutoEncoder":
        return Gated(d_dict)
    if "k" not in tensors:
        return ReLU()
    k = int(tensors["k"])
    if not 1 <= k <= d_dict:
        raise ArtefactError(f"{path}: k={k} must lie in 1..d_dict={d_dict}")
    if name == "AutoEncoderTopK":
        return TopK(k)
    made = BatchTopK(k)
    threshold = float(tensors["threshold"]) if "threshold" in tensors else -1.0
    if not threshold >= 0:
        raise ArtefactError(
            f"{path}: threshold={threshold} was never set in training; every positive latent would fire"
        )
    made.threshold.fill_(threshold)
    return made
