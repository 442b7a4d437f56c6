"""Who is close to a latent: in direction, in when it fires, and among the model's own neurons.

similar      largest cosine of decoder rows
correlated   largest Pearson correlation over the counted tokens (zeros included; from the tally)
neurons      largest |cosine| of the decoder row with the row of W_down that an MLP neuron writes, over all layers
             that come before the site; at a site of neurons, the row's own largest coordinates
Beside each number stands that of the latent's stand-in, an equally frequent other latent, with the same neighbour.
Chance: the largest of n cosines of random directions in d dimensions has median Q(0.5^(1/n)), Q the quantile function
of one cosine t, for which t^2 is Beta(1/2, (d - 1)/2) distributed. The pages print it beside the tables.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import special
from torch import Tensor
from torch.nn import functional as F

from interp.core.sites import Part, Site
from interp.dictionaries.pages.lens import STREAM
from interp.dictionaries.pages.tally import Tally
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
    best = Ranked(values=torch.zeros(len(rows), 0), indices=torch.zeros(len(rows), 0, dtype=torch.int64))
    for start in range(0, len(others), ROWS):
        part = others[start : start + ROWS].to(unit)
        cosines = unit @ F.normalize(part, dim=1).T
        if leave_out is not None:
            inside = (leave_out >= start) & (leave_out < start + len(part))
            places = inside.nonzero()[:, 0], leave_out[inside] - start
            cosines[tuple(place.to(cosines.device) for place in places)] = -math.inf
        best = _merged(best, cosines, start, n)
    return best


def _merged(best: Ranked, values: Tensor, start: int, n: int) -> Ranked:
    """The n largest of what was found and of a new block of columns."""
    numbers = torch.arange(start, start + values.shape[1]).expand(len(values), -1)
    values = torch.cat([best.values, values.cpu()], dim=1)
    numbers = torch.cat([best.indices, numbers], dim=1)
    top = values.topk(min(n, values.shape[1]), dim=1)
    return Ranked(values=top.values, indices=numbers.gather(1, top.indices))


@torch.no_grad()
def aligned_neurons(
    model: LoadedModel, site: Site, rows: Float[Tensor, "n d"], nulls: Float[Tensor, "n d"], n: int
) -> list[tuple[Neighbour, ...]]:
    """The neurons that write most along (or against) each row; empty where no neuron writes into this space."""
    unit, other = F.normalize(rows.float(), dim=1).cpu(), F.normalize(nulls.float(), dim=1).cpu()
    found: list[list[Neighbour]] = [[] for _ in rows]
    for layer, weight in _neurons(model, site, rows.shape[1]):
        written = F.normalize(weight.detach().float().cpu(), dim=1).T
        cosines, beside = unit @ written, other @ written
        top = cosines.abs().topk(min(n, cosines.shape[1]), dim=1).indices
        for r, best in enumerate(top.tolist()):
            found[r] += [
                Neighbour(name=f"L{layer} N{i}", value=float(cosines[r, i]), null=float(beside[r, i])) for i in best
            ]
    return [tuple(sorted(near, key=lambda item: -abs(item.value))[:n]) for near in found]


def _neurons(model: LoadedModel, site: Site, d: int) -> Iterator[tuple[int, Tensor]]:
    """Layer and, per neuron, what it writes in the space of the site, of all neurons before it."""
    if site.path is not None or site.layer is None or not model.table.family:
        return
    if site.part is Part.NEURONS:
        yield site.layer, torch.eye(d)
    for layer in range(site.layer + 1) if site.part in STREAM else ():
        if (layer == site.layer and site.part in BEFORE_MLP) or (layer != site.layer and site.part is Part.MLP_OUT):
            continue
        if model.table.has_weight("W_down", layer):
            weight = model.weight("W_down", layer)
            if weight.ndim == 2 and weight.shape[1] == d:  # experts have one more axis
                yield layer, weight


def n_neurons(model: LoadedModel, site: Site, d: int) -> int:
    """How many neurons a row is compared with."""
    return sum(len(weight) for _, weight in _neurons(model, site, d))


def neighbours_of(
    latents: Int[np.ndarray, " n"],
    nulls: Int[np.ndarray, " n"],
    features: Float[Tensor, "d_dict d_out"],
    tally: Tally,
    neurons: list[tuple[Neighbour, ...]],
    n: int,
) -> list[Neighbours]:
    """One value per latent; `nulls` are their stand-ins, -1 for none."""
    own = torch.from_numpy(latents)
    rows = features[own.to(features.device)].float()
    similar = nearest(rows, features, n, leave_out=own)
    r = torch.from_numpy(tally.correlations(latents))
    r_null, cosines = tally.correlations(np.where(nulls >= 0, nulls, latents)), tally.cosines(latents)
    r[torch.arange(len(own)), own] = -math.inf
    together = r.topk(min(n, r.shape[1]), dim=1)
    coordinates, sizes = rows.topk(min(3, rows.shape[1]), dim=1), rows.abs().sum(1).tolist()
    found: list[Neighbours] = []
    for i, null in enumerate(nulls.tolist()):
        others = features[similar.indices[i].to(features.device)].float()
        beside = F.cosine_similarity(features[null].float(), others, dim=-1).tolist()
        near = _latents(similar.indices[i].tolist(), similar.values[i].tolist(), beside, null)
        beside = r_null[i, together.indices[i].numpy()].tolist()
        firing = _latents(together.indices[i].tolist(), together.values[i].tolist(), beside, null)
        found.append(
            Neighbours(
                similar=near,
                correlated=tuple(
                    replace(item, together=float(cosines[i, int(item.name)])) for item in firing if item.value > 0
                ),
                neurons=neurons[i] if null >= 0 else tuple(replace(item, null=None) for item in neurons[i]),
                coordinates=tuple(
                    (int(j), float(v), abs(float(v)) / sizes[i] if sizes[i] else 0.0)
                    for j, v in zip(coordinates.indices[i], coordinates.values[i], strict=True)
                ),
            )
        )
    return found


def _latents(indices: list[int], values: list[float], beside: list[float], null: int) -> tuple[Neighbour, ...]:
    """As neighbours; the stand-in itself is no null for its own row."""
    return tuple(
        Neighbour(name=str(i), value=value, null=other if null >= 0 and null != i else None, latent=i)
        for i, value, other in zip(indices, values, beside, strict=True)
        if math.isfinite(value)
    )


def chance(n: int, d: int, *, signed: bool) -> float:
    """Median of the largest of n cosines (signed) or |cosines| of random directions in d dimensions."""
    if d < 2 or n < 1:
        return 1.0
    share = 0.5 ** (1 / n)
    below = abs(2 * share - 1) if signed else share
    size = float(special.betaincinv(0.5, (d - 1) / 2, below)) ** 0.5
    return size if not signed or share >= 0.5 else -size
