"""Who is close to a latent: in direction, in when it fires, and among the model's own neurons.

similar      largest cosine of decoder rows
correlated   largest Pearson correlation over the counted tokens (zeros included; from the tally)
neurons      largest |cosine| of the decoder row with the row of W_down that an MLP neuron writes, over all layers
             that come before the site; at a site of neurons, the row's own largest coordinates
Chance: the largest |cosine| of one random direction with n others in d dimensions is about sqrt(2 ln n / d); the pages
print it beside the tables.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from interp.core.sites import Part, Site
from interp.dictionaries.pages.lens import STREAM
from interp.dictionaries.pages.values import Neighbour, Neighbours
from interp.models.model import LoadedModel

BEFORE_MLP = (Part.RESID_PRE, Part.RESID_MID, Part.ATTN_OUT)
"""Parts of the stream that the MLP of their own layer has not written to yet."""
ROWS = 8192
"""Latents or neurons compared at once."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranked:
    """The nearest of each of a few latents, nearest first."""

    values: Float[Tensor, "n found"]
    indices: Int[Tensor, "n found"]


def nearest(
    rows: Float[Tensor, "n d"], others: Float[Tensor, "m d"], n: int, *, leave_out: Int[Tensor, " n"] | None = None
) -> Ranked:
    """Largest cosines; `leave_out` names one of the others for each row, itself."""
    unit = F.normalize(rows.float(), dim=1)
    best = Ranked(values=unit.new_full((len(rows), 0), 0.0), indices=torch.zeros(len(rows), 0, dtype=torch.int64))
    for start in range(0, len(others), ROWS):
        part = others[start : start + ROWS].to(unit)
        cosines = unit @ F.normalize(part, dim=1).T
        if leave_out is not None:
            inside = (leave_out >= start) & (leave_out < start + len(part))
            cosines[inside.nonzero()[:, 0], leave_out[inside] - start] = -math.inf
        best = _merged(best, cosines, start, n)
    return best


def _merged(best: Ranked, values: Tensor, start: int, n: int) -> Ranked:
    """The n largest of what was found and of a new block of columns."""
    numbers = torch.arange(start, start + values.shape[1]).expand(len(values), -1)
    values = torch.cat([best.values, values.cpu()], dim=1)
    numbers = torch.cat([best.indices, numbers], dim=1)
    top = values.topk(min(n, values.shape[1]), dim=1)
    return Ranked(values=top.values, indices=numbers.gather(1, top.indices))


def aligned_neurons(model: LoadedModel, site: Site, rows: Float[Tensor, "n d"], n: int) -> list[list[Neighbour]]:
    """The neurons that write most along (or against) each row; empty where no neuron writes into this space."""
    unit = F.normalize(rows.float(), dim=1).cpu()
    if site.part is Part.NEURONS:
        top = unit.abs().topk(min(n, unit.shape[1]), dim=1).indices
        return [
            [Neighbour(name=f"L{site.layer} N{i}", value=float(unit[r, i])) for i in found]
            for r, found in enumerate(top.tolist())
        ]
    found: list[list[tuple[float, str]]] = [[] for _ in rows]
    for layer in _layers_before(model, site):
        weight = model.weight("W_down", layer)
        if weight.ndim != 2 or weight.shape[1] != unit.shape[1]:
            continue
        cosines = unit @ F.normalize(weight.detach().float().cpu(), dim=1).T
        top = cosines.abs().topk(min(n, cosines.shape[1]), dim=1).indices
        for r, best in enumerate(top.tolist()):
            found[r] += [(float(cosines[r, i]), f"L{layer} N{i}") for i in best]
    ranked = [sorted(rows_found, key=lambda item: -abs(item[0]))[:n] for rows_found in found]
    return [[Neighbour(name=name, value=value) for value, name in rows_found] for rows_found in ranked]


def _layers_before(model: LoadedModel, site: Site) -> list[int]:
    """Layers whose MLP has written into the site."""
    if site.path is not None or site.layer is None or site.part not in STREAM or not model.table.family:
        return []
    if site.part is Part.MLP_OUT:
        layers = [site.layer]
    else:
        layers = list(range(site.layer if site.part in BEFORE_MLP else site.layer + 1))
    return [layer for layer in layers if model.table.has_weight("W_down", layer)]


def neighbours_of(
    latents: Int[np.ndarray, " n"],
    features: Float[Tensor, "d_dict d_out"],
    correlations: Float[np.ndarray, "n d_dict"],
    neurons: list[list[Neighbour]],
    n: int,
) -> list[Neighbours]:
    """One value per latent."""
    own = torch.from_numpy(latents)
    rows = features[own.to(features.device)]
    similar = nearest(rows.cpu(), features.detach().cpu(), n, leave_out=own)
    r = torch.from_numpy(correlations).clone()
    r[torch.arange(len(own)), own] = -math.inf
    together = r.topk(min(n, r.shape[1]), dim=1)
    coordinates = rows.float().cpu().topk(min(3, rows.shape[1]), dim=1)
    sizes = rows.float().abs().sum(1).cpu()
    return [
        Neighbours(
            similar=_latents(similar.values[i], similar.indices[i]),
            correlated=_latents(together.values[i], together.indices[i], above=0.0),
            neurons=tuple(neurons[i]),
            coordinates=tuple(
                (int(j), float(v), abs(float(v)) / float(sizes[i]) if sizes[i] else 0.0)
                for j, v in zip(coordinates.indices[i], coordinates.values[i], strict=True)
            ),
        )
        for i in range(len(own))
    ]


def _latents(values: Tensor, indices: Tensor, above: float = -math.inf) -> tuple[Neighbour, ...]:
    pairs = zip(indices.tolist(), values.tolist(), strict=True)
    return tuple(Neighbour(name=str(i), value=v, latent=i) for i, v in pairs if v > above and math.isfinite(v))


def chance(n: int, d: int) -> float:
    """About the largest |cosine| of a random direction with n others in d dimensions."""
    return min(1.0, math.sqrt(2 * math.log(max(n, 2)) / d))
