"""sparsify folders: `<hookpoint>/cfg.json` and `<hookpoint>/sae.safetensors`, as `sparsify.SparseCoder` reads them.

Tensors: encoder.weight (m, d), encoder.bias (m), W_dec (m, d), b_dec (d), and W_skip (d, d) used as x W_skip^T.
Config: activation (topk or groupmax), k, num_latents (0 stands for expansion_factor * d_in), transcode (b_dec is not
subtracted from the input), skip_connection, multi_topk. `normalize_decoder` concerns training alone.
The folder is named by the module that was read, e.g. `layers.10.mlp`; `<run>/config.json` above it names the model.
Source: https://github.com/EleutherAI/sparsify, sparse_coder.py. Trap: SAELens' reader of these files transposes W_dec
and takes normalize_decoder for the subtraction, so it is no reference.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from interp.core.errors import ArtefactError, InterpError
from interp.dictionaries.activations.base import Activation
from interp.dictionaries.activations.group_max import GroupMax
from interp.dictionaries.activations.topk import TopK
from interp.dictionaries.formats.files import empty_or, publish, read_json, read_tensors, write_json, write_tensors
from interp.dictionaries.formats.hooks import module_of_site, site_of_module
from interp.dictionaries.formats.parts import Parts, assemble, check_tensors, positive_int, take_apart
from interp.dictionaries.saved import SavedDictionary

CONFIG, WEIGHTS, RUN = "cfg.json", "sae.safetensors", "config.json"


def read(folder: Path | str) -> SavedDictionary:
    """The dictionary in the folder of one hookpoint."""
    folder = Path(folder)
    path = folder / CONFIG
    config = read_json(path)
    if "d_in" not in config:
        raise ArtefactError(f"{path} lacks d_in; is it a sparsify file?")
    if config.get("signed"):
        raise ArtefactError(f"{path}: signed codes (an old option of sparsify) are not read here")
    d_in = positive_int(config["d_in"], "d_in", path)
    n_latents = config.get("num_latents") or d_in * positive_int(config.get("expansion_factor", 32), "expansion", path)
    d_dict = positive_int(n_latents, "num_latents", path)
    transcodes, skip = bool(config.get("transcode", False)), bool(config.get("skip_connection", False))
    tensors = read_tensors(folder / WEIGHTS)
    shapes = {"encoder.weight": (d_dict, d_in), "encoder.bias": (d_dict,), "W_dec": (d_dict, d_in), "b_dec": (d_in,)}
    if skip:
        shapes["W_skip"] = (d_in, d_in)
    check_tensors(tensors, shapes, folder / WEIGHTS, what="this coder", says=CONFIG)
    k = positive_int(config.get("k", 32), "k", path)
    if k > d_dict:
        raise ArtefactError(f"{path}: k={k} must lie in 1..d_dict={d_dict}")
    parts = Parts(
        W_enc=tensors["encoder.weight"].t(), b_enc=tensors["encoder.bias"], W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"], activation=_activation(config, k, d_dict, path),
        W_skip=tensors["W_skip"].t() if skip else None, subtract_b_dec=not transcodes,
    )  # fmt: skip
    return SavedDictionary(
        dictionary=assemble(parts, path), about=_about(folder, config, transcodes),
        certificate=_own(config).get("certificate"), path=folder,
    )  # fmt: skip


def write(saved: SavedDictionary, folder: Path | str) -> Path:
    """Write the folder of one hookpoint. Raises InterpError where sparsify has no such coder."""
    made, about = saved.dictionary, saved.about
    if not isinstance(made.activation, TopK | GroupMax):
        raise InterpError(f"sparsify has top-k and group-max coders, no {made.activation.kind}; use another format")
    if made.d_in != made.d_out:
        raise InterpError(f"sparsify coders have one width, this one d_in={made.d_in} and d_out={made.d_out}")
    if made.token_norm != "none":
        raise InterpError(f"sparsify does not normalise tokens one by one, token_norm={made.token_norm!r} is lost")
    if isinstance(made.activation, GroupMax) and made.d_dict % made.activation.k:
        raise InterpError(f"d_dict={made.d_dict} is not a multiple of k={made.activation.k}, the number of groups")
    parts = take_apart(made)
    tensors = {
        "encoder.weight": parts.W_enc.t().contiguous(), "encoder.bias": parts.b_enc, "W_dec": parts.W_dec,
        "b_dec": parts.b_dec,
    }  # fmt: skip
    if parts.W_skip is not None:
        tensors["W_skip"] = parts.W_skip.t().contiguous()
    norms = parts.W_dec.float().norm(dim=1)
    config: dict[str, Any] = {
        "activation": "topk" if isinstance(made.activation, TopK) else "groupmax",
        "expansion_factor": max(made.d_dict // made.d_in, 1),
        "normalize_decoder": bool(((norms - 1).abs() < 1e-2).all()),
        "num_latents": made.d_dict,
        "k": made.activation.k,
        "multi_topk": isinstance(made.activation, TopK) and made.activation.n_train > 0,
        "skip_connection": parts.W_skip is not None,
        "transcode": not parts.subtract_b_dec,
        "d_in": made.d_in,
    }
    known = {name: about[name] for name in ("model", "weight_hash", "site", "target_site") if about.get(name)}
    if saved.certificate is not None:
        known["certificate"] = dict(saved.certificate)
    if known:
        config["interp"] = known

    def fill(draft: Path) -> None:
        draft.mkdir()
        write_tensors(draft / WEIGHTS, tensors)
        write_json(draft / CONFIG, config)

    return publish(Path(folder), fill, replaces=empty_or(CONFIG, WEIGHTS))


def hookpoint(saved: SavedDictionary) -> str | None:
    """The name that the folder should have for `SparseCoder.load_many`; None where it is not known."""
    return module_of_site(saved.about.get("target_site") or saved.about.get("site"))


def _activation(config: dict[str, Any], k: int, d_dict: int, path: Path) -> Activation:
    name = config.get("activation", "topk")
    if name == "groupmax":
        if d_dict % k:
            raise ArtefactError(f"{path}: {d_dict} latents do not fall into k={k} equal groups")
        return GroupMax(k)
    if name != "topk":
        raise ArtefactError(f"{path}: activation {name!r} is not read here; known are topk and groupmax")
    return TopK(k, n_train=min(4 * k, d_dict)) if config.get("multi_topk") else TopK(k)


def _own(config: dict[str, Any]) -> dict[str, Any]:
    own = config.get("interp")
    return cast("dict[str, Any]", own) if isinstance(own, dict) else {}


def _about(folder: Path, config: dict[str, Any], transcodes: bool) -> dict[str, Any]:
    own = _own(config)
    run: dict[str, Any] = {}
    if (folder.parent / RUN).is_file():
        run = read_json(folder.parent / RUN)
    known = site_of_module(folder.name)
    named = known if known != folder.name or "." in folder.name else None
    about = {
        "source": f"sparsify {config.get('activation', 'topk')}",
        "model": own.get("model") or run.get("model"),
        "weight_hash": own.get("weight_hash"),
        "site": own.get("site") or (site_of_module(folder.name, takes=True) if transcodes and named else named),
        "target_site": own.get("target_site") or (named if transcodes else None),
    }
    return {name: value for name, value in about.items() if value is not None}


def is_coder(folder: Path) -> bool:
    """Whether this is the folder of one hookpoint."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def coders(folder: Path) -> list[str]:
    """Hookpoints below the folder of a run."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and is_coder(path))
