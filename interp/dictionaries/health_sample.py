"""Activations on which a dictionary's health is measured, at its site and at those it might be mistaken for.

Position 0 and tokens whose norm is above `drop_norm` medians are left out at each site by its own norms, as in training
(`interp.dictionaries.sinks`). A token counts if it does at the input and at the target. Heads of a site are read side
by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import InterpError, SiteError
from interp.core.sites import Site
from interp.core.vocabulary import Part
from interp.dictionaries.sinks import ordinary
from interp.instrument.capture import capture
from interp.instrument.tokens import TokenRecord
from interp.models.model import LoadedModel
from interp.tasks.corpora import load_corpus

BATCH = 8
"""Sequences per forward."""
STREAM = (Part.RESID_PRE, Part.RESID_MID, Part.RESID_POST)
SIMILAR = (*STREAM, Part.ATTN_OUT, Part.MLP_OUT, Part.ATTN_IN, Part.MLP_IN, Part.Z, Part.NEURONS)
"""Points of a block that are taken for each other."""


@dataclass(frozen=True, kw_only=True)
class HealthText:
    """The text to measure on; any text the dictionary was meant for will do, the same one compares sharply."""

    corpus: str = "docs"
    """docs, docs:TOPIC, docstrings:PACKAGE, file:PATH, ..."""
    n_sequences: int = 16
    length: int = 128
    skip: int = 0
    """Sequences left out first, such as those trained on."""
    drop_norm: float = 10.0
    """Leave out position 0 and tokens above this multiple of the median norm; 0 keeps every token."""


@dataclass(frozen=True)
class Place:
    """Where a dictionary reads, and where it writes; the same site for an autoencoder."""

    site: Site
    target: Site

    def __str__(self) -> str:
        return str(self.site) if self.site == self.target else f"{self.site} to {self.target}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Sampled:
    """Inputs and targets at one place."""

    x: Float[Tensor, "n d_in"]
    y: Float[Tensor, "n d_out"]


def read_text(model: LoadedModel, text: HealthText) -> TokenRecord:
    """The tokens of a text; fewer where the corpus is short."""
    return load_corpus(model, text.corpus, text.n_sequences, text.length, skip=text.skip)


def text_of(certificate: Mapping[str, Any] | None) -> tuple[HealthText, str | None]:
    """The text a certificate was measured on, and its hash; the default text and None where it does not say."""
    written = dict((certificate or {}).get("text") or {})
    known = {name: written[name] for name in asdict(HealthText()) if name in written}
    return HealthText(**known), written.get("hash") if "corpus" in written else None


def place_of(model: LoadedModel, site: str | None, target: str | None) -> Place:
    """The place, if this model has it. Raises InterpError for a name that is missing, SiteError for one it lacks."""
    if not site:
        raise InterpError(
            "the files do not say which site the dictionary reads; pass site= (--site), e.g. resid_post.10"
        )
    return Place(model.table.one(site), model.table.one(target or site))


@torch.no_grad()
def sample(model: LoadedModel, record: TokenRecord, places: Sequence[Place], drop_norm: float) -> dict[Place, Sampled]:
    """Inputs and targets at every place, from one pass over the text."""
    sites = list(dict.fromkeys(site for place in places for site in (place.site, place.target)))
    parts: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for start in range(0, len(record), BATCH):
        with capture(model, sites) as acts:
            model(record.rows(slice(start, start + BATCH)))
        for site in sites:
            parts[site].append(acts[site].float().flatten(2))
    values = {site: torch.cat(found) for site, found in parts.items()}
    keeps = {site: _kept(record, value, drop_norm) for site, value in values.items()}
    sampled: dict[Place, Sampled] = {}
    for place in places:
        keep = keeps[place.site] & keeps[place.target]
        sampled[place] = Sampled(x=values[place.site][keep], y=values[place.target][keep])
        if len(sampled[place].x) < 2:
            raise InterpError(f"{len(sampled[place].x)} tokens are left at {place}; take more text or raise drop_norm")
    return sampled


def _kept(record: TokenRecord, x: Tensor, drop_norm: float) -> Tensor:
    keep = record.mask.to(x.device)
    if drop_norm:
        median = float(x[keep].norm(dim=-1).median())
        keep = keep & ordinary(x, drop_norm, median=median)
        keep &= (torch.arange(x.shape[1]) != record.first[:, None]).to(x.device)
    return keep


def next_to(model: LoadedModel, place: Place) -> list[Place]:
    """Places it might be mistaken for: one layer up and down, and other points of the same layer."""
    found: list[Place] = [shifted for step in (-1, 1) if (shifted := _shifted(model, place, step)) is not None]
    if place.site.path is None and place.site.layer is not None:
        for part in SIMILAR:
            site = replace(place.site, part=part)
            found.append(Place(site, site if place.site == place.target else place.target))
    return [other for other in dict.fromkeys(found) if other != place and _has(model, other)]


def along_the_depth(model: LoadedModel, place: Place) -> list[Place]:
    """The same place at every layer."""
    return [
        shifted for step in range(-model.n_layers, model.n_layers + 1)
        if step and (shifted := _shifted(model, place, step)) is not None
    ]  # fmt: skip


def same_point(place: Place) -> Place:
    """The place with resid_pre named as the resid_post of the layer before: one tensor, one name."""
    return Place(*(
        Site(Part.RESID_POST, site.layer - 1) if site.part is Part.RESID_PRE and site.path is None and site.layer
        else site for site in (place.site, place.target)
    ))  # fmt: skip


def _shifted(model: LoadedModel, place: Place, step: int) -> Place | None:
    if place.site.layer is None or place.target.layer is None:
        return None
    layers = (place.site.layer + step, place.target.layer + step)
    if not all(0 <= layer < model.n_layers for layer in layers):
        return None
    other = Place(replace(place.site, layer=layers[0]), replace(place.target, layer=layers[1]))
    return other if _has(model, other) else None


def _has(model: LoadedModel, place: Place) -> bool:
    try:
        return len(model.resolve([place.site, place.target])) > 0
    except SiteError:
        return False
