"""SAELens folders: `cfg.json` and `sae_weights.safetensors`, as `sae_lens.SAE.load_from_disk` reads them.

architecture              tensors besides W_enc (d_in, m), W_dec (m, d_out), b_dec (d_out)
standard                  b_enc (m)
topk, abstopk             b_enc
jumprelu                  b_enc, threshold (m)
gated                     b_gate, r_mag, b_mag (m)
transcoder                b_enc                       nothing is subtracted from the input
skip_transcoder           b_enc, W_skip (d_out, d_in), used as x W_skip^T
jumprelu_transcoder       b_enc, threshold
jumprelu_skip_transcoder  b_enc, threshold, W_skip
An abstopk keeps signs: latent i becomes i (positive) and m + i (negative) of a top-k with 2 m latents, the same
function. Written with input scales folded in, since their `expected_average_only_in` does nothing at inference, and
rows as they are (`rescale_acts_by_decoder_norm` false). Half-precision weights that have to be folded become float32. A
batch top-k becomes a jumprelu with its threshold m times.
Their layer_norm leaves out 1e-5 where it is undone, so reconstructions differ by 1e-5 / std. A folder appears whole or
not at all. Metadata `interp` holds what the format has no place for: the certificate and the weight hash.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import ArtefactError, InterpError
from interp.core.sites import Site
from interp.dictionaries.activations.gated import Gated
from interp.dictionaries.activations.jump_relu import JumpReLU
from interp.dictionaries.activations.relu import ReLU
from interp.dictionaries.activations.topk import TopK
from interp.dictionaries.dictionary import SparseDictionary
from interp.dictionaries.formats.files import empty_or, publish, read_tensors, write_json, write_tensors
from interp.dictionaries.formats.hooks import lens_of_site, site_of_lens
from interp.dictionaries.formats.parts import Parts, assemble, check_tensors, not_half, take_apart
from interp.dictionaries.formats.saelens_config import CONFIG, TOKEN_NORMS, SaeLensConfig, read_config
from interp.dictionaries.saved import SavedDictionary

WEIGHTS, SPARSITY = "sae_weights.safetensors", "sparsity.safetensors"
FORMAT_VERSION = "6.54.12"
"""SAELens release whose format is written; below 6.0.0 their loader would rename keys."""
FLOOR = 1e-10
"""Added to the firing frequency before its logarithm in `sparsity.safetensors`."""


def load_saelens(folder: Path | str, *, input_scale: float | None = None) -> SparseDictionary:
    """The dictionary in a SAELens folder; rows rescaled by their norm are folded, so latents are those of SAELens.

    `input_scale` is sqrt(d_in) / mean |x| of the training data, for files that ask for `expected_average_only_in`.
    """
    return read(folder, input_scale=input_scale).dictionary


def read(folder: Path | str, *, input_scale: float | None = None) -> SavedDictionary:
    """The dictionary, and what its config says about it."""
    folder = Path(folder)
    config = read_config(folder / CONFIG)
    if config.expected_average and input_scale is None:
        raise ArtefactError(
            f"{folder / CONFIG}: the weights expect inputs times sqrt(d_in) / mean |x| of the training data "
            "(expected_average_only_in), and the file does not hold that number; pass input_scale=, or 1 if it is "
            "folded in already"
        )
    if input_scale is not None and not config.expected_average:
        raise ArtefactError(f"{folder / CONFIG} asks for no input scale; drop input_scale={input_scale}")
    tensors = {name: tensor.to(config.dtype) for name, tensor in _weights(folder, config).items()}
    check_tensors(tensors, _shapes(config), folder / WEIGHTS, what=f"a {config.architecture}", says=CONFIG)
    made = assemble(_parts(tensors, config), folder / CONFIG)
    if input_scale is not None:
        made.scale_in = torch.tensor(input_scale, dtype=config.dtype)
        made.scale_out = made.scale_in.clone()
    own = config.metadata.get("interp")
    own = cast("dict[str, Any]", own) if isinstance(own, dict) else {}
    hook, out = config.metadata.get("hook_name"), config.metadata.get("hook_name_out")
    about = {
        "source": f"saelens {config.architecture}",
        "model": config.metadata.get("model_name"),
        "weight_hash": own.get("weight_hash", config.metadata.get("interp_weight_hash")),
        "site": own.get("site") or config.metadata.get("interp_site") or site_of_lens(hook),
        "target_site": own.get("target_site") or site_of_lens(out),
        "hook_z": config.hook_z,
        "metadata": dict(config.metadata),
    }
    known = {name: value for name, value in about.items() if value not in (None, False)}
    return SavedDictionary(dictionary=made, about=known, certificate=own.get("certificate"), path=folder)


def read_density(folder: Path | str) -> Float[Tensor, "d_dict"] | None:
    """Share of tokens at which each latent fired when it was trained; None without a sparsity file."""
    path = Path(folder) / SPARSITY
    if not path.is_file():
        return None
    tensors = read_tensors(path)
    if set(tensors) != {"sparsity"}:
        raise ArtefactError(f"{path} holds {sorted(tensors)}, expected 'sparsity'")
    return (10 ** tensors["sparsity"].double() - FLOOR).clamp_min(0).float()


def save_saelens(
    sae: SparseDictionary,
    folder: Path | str,
    *,
    site: Site | None = None,
    metadata: Mapping[str, Any] | None = None,
    density: Float[Tensor, "d_dict"] | None = None,
) -> Path:
    """Write a dictionary as a SAELens folder; an older one there is replaced, other folders refused."""
    about: dict[str, Any] = {} if site is None else {"site": str(site)}
    saved = SavedDictionary(dictionary=sae, about=about | {"metadata": dict(metadata or {})})
    return write(saved, folder, density=density)


def write(saved: SavedDictionary, folder: Path | str, *, density: Float[Tensor, "d_dict"] | None = None) -> Path:
    """Write a saved dictionary with what is known about it. Raises InterpError where SAELens has no such kind."""
    about = saved.about
    architecture = architecture_of(saved)
    transcodes = "transcoder" in architecture
    parts = take_apart(saved.dictionary, subtract=False if transcodes else None)
    tensors: dict[str, Tensor | None] = {
        "W_enc": parts.W_enc, "W_dec": parts.W_dec, "b_dec": parts.b_dec, "threshold": parts.threshold,
        "W_skip": None if parts.W_skip is None else parts.W_skip.t().contiguous(),
        "b_gate" if architecture == "gated" else "b_enc": parts.b_enc, "r_mag": parts.r_mag, "b_mag": parts.b_mag,
    }  # fmt: skip
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": saved.dictionary.d_in,
        "d_sae": saved.dictionary.d_dict,
        "dtype": str(parts.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": parts.subtract_b_dec,
        "normalize_activations": {ours: theirs for theirs, ours in TOKEN_NORMS.items()}[parts.token_norm],
        "reshape_activations": "hook_z" if about.get("hook_z") else "none",
    }
    if transcodes:
        config["d_out"] = saved.dictionary.d_out
    if isinstance(parts.activation, TopK):
        config |= {"k": parts.activation.k, "rescale_acts_by_decoder_norm": False}
    config["metadata"] = _metadata(saved)

    def fill(draft: Path) -> None:
        draft.mkdir()
        write_tensors(draft / WEIGHTS, {name: value for name, value in tensors.items() if value is not None})
        write_json(draft / CONFIG, config)
        if density is not None:
            write_tensors(draft / SPARSITY, {"sparsity": (density.double() + FLOOR).log10().float()})

    return publish(Path(folder), fill, replaces=empty_or(CONFIG, WEIGHTS))


def architecture_of(saved: SavedDictionary) -> str:
    """The SAELens architecture that computes this dictionary; InterpError where there is none."""
    made, about = saved.dictionary, saved.about
    kind = made.activation.kind
    to = about.get("target_site")
    transcodes = made.W_skip is not None or made.d_in != made.d_out or (to is not None and to != about.get("site"))
    families = {"relu": "", "jump_relu": "jumprelu", "batch_topk": "jumprelu"}
    if transcodes:
        if kind not in families:
            raise InterpError(f"SAELens has no {kind} transcoder, only relu and jumprelu ones; use another format")
        if made.token_norm != "none":
            raise InterpError(f"SAELens does not undo token_norm={made.token_norm!r} on the output of a transcoder")
        skip = "skip" if made.W_skip is not None else ""
        return "_".join(word for word in (families[kind], skip, "transcoder") if word)
    if isinstance(made.activation, TopK):
        return "topk"
    if kind == "gated":
        return "gated"
    if kind not in families:
        raise InterpError(f"SAELens has no {kind} architecture; use the format 'interp' or 'plain'")
    return families[kind] or "standard"


def _metadata(saved: SavedDictionary) -> dict[str, Any]:
    about = saved.about
    kept = {name: value for name, value in dict(about.get("metadata") or {}).items() if name != "interp"}
    found = {"sae_lens_version": FORMAT_VERSION, "prepend_bos": False} | kept
    found["sae_lens_version"] = FORMAT_VERSION
    for name, value in (
        ("model_name", about.get("model")),
        ("hook_name", lens_of_site(about.get("site"))),
        ("hook_name_out", lens_of_site(about.get("target_site"))),
    ):
        if value is not None:
            found.setdefault(name, value)
    own = {name: about[name] for name in ("weight_hash", "site", "target_site") if about.get(name) is not None}
    if saved.certificate is not None:
        own["certificate"] = dict(saved.certificate)
    return found | {"interp": own} if own.get("certificate") or own.get("weight_hash") else found


def _shapes(config: SaeLensConfig) -> dict[str, tuple[int, ...]]:
    m, d_in, d_out = config.d_dict, config.d_in, config.d_out
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, m), "W_dec": (m, d_out), "b_dec": (d_out,)}
    if config.architecture == "gated":
        return shapes | {"b_gate": (m,), "r_mag": (m,), "b_mag": (m,)}
    shapes["b_enc"] = (m,)
    if "jumprelu" in config.architecture:
        shapes["threshold"] = (m,)
    if "skip" in config.architecture:
        shapes["W_skip"] = (d_out, d_in)
    return shapes


def _weights(folder: Path, config: SaeLensConfig) -> dict[str, Tensor]:
    tensors = read_tensors(folder / WEIGHTS)
    factor = tensors.pop("scaling_factor", None)
    if factor is None or bool((factor == 1).all()):
        return tensors
    if not config.finetuned or "W_dec" not in tensors:
        raise ArtefactError(f"{folder / WEIGHTS} holds a scaling_factor that {CONFIG} does not mention")
    tensors["W_dec"] = tensors["W_dec"] * factor[:, None]  # codes times the factor, before decoding
    return tensors


def _parts(tensors: Mapping[str, Tensor], config: SaeLensConfig) -> Parts:
    if config.rescaled:
        tensors = {name: tensor.to(not_half(tensor.dtype)) for name, tensor in tensors.items()}
    W_enc, W_dec = tensors["W_enc"], tensors["W_dec"]
    b_enc = tensors["b_gate" if config.architecture == "gated" else "b_enc"]
    if config.rescaled:
        norms = W_dec.norm(dim=1)
        W_enc, b_enc, W_dec = W_enc * norms, b_enc * norms, W_dec / norms[:, None]
    if config.architecture == "abstopk":
        W_enc, b_enc, W_dec = torch.cat([W_enc, -W_enc], 1), torch.cat([b_enc, -b_enc]), torch.cat([W_dec, -W_dec])
    activation = ReLU()
    if config.k is not None:
        if config.k > config.d_dict:
            raise ArtefactError(f"{CONFIG}: k={config.k} must lie in 1..d_dict={config.d_dict}")
        activation = TopK(config.k)
    elif "jumprelu" in config.architecture:
        activation = JumpReLU(config.d_dict)
    elif config.architecture == "gated":
        activation = Gated(config.d_dict)
    return Parts(
        W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=tensors["b_dec"], activation=activation,
        threshold=tensors.get("threshold"), r_mag=tensors.get("r_mag"), b_mag=tensors.get("b_mag"),
        W_skip=tensors["W_skip"].t() if "W_skip" in tensors else None,
        subtract_b_dec=config.subtract_b_dec, token_norm=config.token_norm,
    )  # fmt: skip
