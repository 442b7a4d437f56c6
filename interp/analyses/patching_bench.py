"""One forward per site: the slow way that exact patching is compared with (part of `patching` and of the bench)."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from interp.analyses.patching_places import make_grid
from interp.analyses.patching_runs import Intervention, make_runs
from interp.analyses.patching_wave import all_patches, patched_logits
from interp.core.errors import InterpError
from interp.core.sites import Part, Site
from interp.instrument.capture import capture
from interp.instrument.edits import edited, patch_from
from interp.models.model import LoadedModel
from interp.tasks.base import PromptPairs, align
from interp.tasks.ioi import draft, random_pairs

STRIDE = 11
"""The slow way is timed on every eleventh site, which comes to every position in turn."""


def bench_pair(model: LoadedModel) -> PromptPairs:
    """One pair of prompts; of random tokens where names are not tokens."""
    try:
        return align(model, [draft("Mary", "John", "John")])
    except InterpError:
        return random_pairs(model, n=1, length=14)


def one_by_one(model: LoadedModel, pairs: PromptPairs, sites: Sequence[tuple[int, int]]) -> Float[Tensor, "site vocab"]:
    """Denoised logits of the first pair at the last token, a whole forward for each (layer, position)."""
    row = pairs.take([0])
    with capture(model, "resid_post.*") as donor:
        model(row.clean.ids)
    found: list[Tensor] = []
    for layer, position in sites:
        site = f"resid_post.{layer}"
        with edited(model, patch_from(site, donor[site], at=position)):
            found.append(model(row.corrupt.ids)[0, -1])
    return torch.stack(found)


def in_a_wave(model: LoadedModel, pairs: PromptPairs) -> dict[tuple[int, int], Float[Tensor, " vocab"]]:
    """The same for every (layer, position) of resid_post at once."""
    row = pairs.take([0])
    sites = [Site(Part.RESID_POST, layer) for layer in range(model.n_layers)]
    runs = make_runs(model, row, Intervention.DENOISE, sites)
    patches = all_patches([make_grid(model, row, "resid_post")], runs)
    found = {patch.cell[1:]: runs.base.logits[0, -1] for patch in patches}
    for wave, logits in patched_logits(model, runs, patches, "patching"):
        found |= {patch.cell[1:]: value for patch, value in zip(wave, logits[:, -1], strict=True)}
    return found


def all_sites(model: LoadedModel, pairs: PromptPairs) -> list[tuple[int, int]]:
    """Every (layer, position), in order."""
    return [(layer, position) for layer in range(model.n_layers) for position in range(pairs.n_pos)]


def compare_naive(model: LoadedModel) -> dict[str, float]:
    """Seconds of both ways for all resid_post sites of one pair, their ratio, and the largest difference of the logit
    difference in nats. The slow way runs every eleventh site and is scaled up; the difference is over those."""
    pairs = bench_pair(model)
    sites = all_sites(model, pairs)
    in_a_wave(model, pairs)
    started = time.perf_counter()
    wave = in_a_wave(model, pairs)
    between = time.perf_counter()
    slow = one_by_one(model, pairs, sites[::STRIDE])
    seconds_slow = (time.perf_counter() - between) * len(sites) / len(slow)
    fast = torch.stack([wave[site] for site in sites[::STRIDE]])
    right, wrong = pairs.answers[0].tolist()
    apart = (fast[:, right] - fast[:, wrong]) - (slow[:, right] - slow[:, wrong])
    return {
        "n_sites": float(len(sites)),
        "seconds_wave": between - started,
        "seconds_one_by_one": seconds_slow,
        "ratio": seconds_slow / (between - started),
        "max_difference": float(apart.abs().max()),
    }
