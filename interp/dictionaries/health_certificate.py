"""What a dictionary was like when it was trained: the numbers that are saved with it.

fvu, l0, cosine, norm_ratio, gamma, dead_fraction, dense_fraction    as in `metrics`
mean_norm_in, mean_norm_target      mean norms of inputs and targets
decoder_norms, row_gains, density   quantiles over latents of |d_i|, |e_i| |d_i|, and of the share of tokens that fire
scale_in, scale_out, token_norm     how inputs are normalised
All in the units of the activations, so that folding scales into the weights, or norms of the decoder into the encoder
on both sides, leaves them as they are; |e_i| |d_i| changes where only one side was folded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.dictionaries.base import rows
from interp.dictionaries.dictionary import SparseDictionary
from interp.dictionaries.health_sample import HealthText, Place, place_of, read_text, sample
from interp.dictionaries.metrics import evaluate
from interp.dictionaries.saved import SavedDictionary
from interp.models.model import LoadedModel

VERSION = 1
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
MEDIAN = QUANTILES.index(0.5)
BLOCK = 1024
"""Tokens encoded at once."""


@torch.no_grad()
def certify(
    dictionary: SparseDictionary,
    x: Float[Tensor, "n d_in"],
    y: Float[Tensor, "n d_out"] | None = None,
    *,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The statistics of a dictionary on inputs x and targets y (x itself where there are none), as plain values.

    `about` is what they were measured on: model, weight_hash, model_dtype, site, target_site, text.
    """
    dictionary = wide(dictionary)
    x = x.to(dictionary.W_dec)
    y = x if y is None else y.to(dictionary.W_dec)
    found = evaluate(dictionary, zip(rows(x, BLOCK), rows(y, BLOCK), strict=True))
    decoder = dictionary.features.norm(dim=1)
    encoder = (dictionary.W_enc * dictionary.scale_in.reshape(-1, 1)).norm(dim=0)
    return {
        "version": VERSION,
        **{name: value for name, value in dict(about or {}).items() if value is not None},
        "activation": dictionary.activation.kind,
        "settings": dict(dictionary.activation.settings()),
        "n_tokens": found.n_tokens,
        "fvu": found.fvu,
        "l0": found.l0,
        "cosine": found.cosine,
        "norm_ratio": found.norm_ratio,
        "gamma": found.gamma,
        "dead_fraction": found.dead_fraction,
        "dense_fraction": found.dense_fraction,
        "mean_norm_in": float(x.norm(dim=1).mean()),
        "mean_norm_target": float(y.norm(dim=1).mean()),
        "decoder_norms": quantiles(decoder),
        "row_gains": quantiles(encoder * decoder),
        "density": quantiles(found.density),
        "scale_in": float(dictionary.scale_in.mean()),
        "scale_out": float(dictionary.scale_out.mean()),
        "token_norm": dictionary.token_norm,
    }


def certified(
    saved: SavedDictionary,
    model: LoadedModel,
    text: HealthText | None = None,
    *,
    site: str | None = None,
    target: str | None = None,
) -> SavedDictionary:
    """The dictionary with a certificate measured now, on this model and text, at its own site or the one given."""
    text = text or HealthText()
    place = place_of(model, site or saved.about.get("site"), target or saved.about.get("target_site"))
    record = read_text(model, text)
    data = sample(model, record, [place], text.drop_norm)[place]
    known = identity(model, place) | {"text": asdict(text) | {"hash": record.hash}}
    made = certify(saved.dictionary, data.x, data.y, about=known)
    about = {name: value for name, value in known.items() if name in ("model", "weight_hash", "site", "target_site")}
    kept = {name: value for name, value in saved.about.items() if name != "target_site"}
    return replace(saved, about=kept | {k: v for k, v in about.items() if v is not None}, certificate=made)


def identity(model: LoadedModel, place: Place) -> dict[str, Any]:
    """Which model and place, as a certificate says it."""
    record = model.record()
    return {
        "model": record.source,
        "weight_hash": record.weight_hash,
        "model_dtype": record.dtype,
        "site": str(place.site),
        "target_site": None if place.target == place.site else str(place.target),
    }


def wide(dictionary: SparseDictionary) -> SparseDictionary:
    """In float32 at least: numbers of half precision would be about rounding."""
    return dictionary.like().float() if dictionary.W_dec.dtype in (torch.float16, torch.bfloat16) else dictionary


def quantiles(values: Tensor) -> list[float]:
    wide = values.detach().double().cpu().sort().values
    where = torch.tensor(QUANTILES, dtype=torch.float64) * (len(wide) - 1)
    low = wide[where.floor().long()]  # by hand: torch.quantile takes at most 16 million values
    return (low + (wide[where.ceil().long()] - low) * where.frac()).tolist()
