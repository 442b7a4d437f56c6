"""Which latents get a page, and which equally frequent latent stands in for each in the nulls.

Latents are drawn at random among the live ones, never chosen for being readable. The stand-in of a latent is drawn
among the live latents nearest to it in frequency, so that a score which only measures how often a latent fires comes
out the same for both. The draw depends on the seed and the latent alone, not on what else is shown.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int

from interp.core.errors import InterpError
from interp.core.seed import numpy_generator, torch_generator
from interp.dictionaries.pages.config import Wanted

NEAREST = 16
"""Stand-ins are drawn among so many latents, the nearest in frequency."""


def choose_latents(
    firings: Int[np.ndarray, " d_dict"], wanted: Wanted, *, min_firings: int, seed: int
) -> Int[np.ndarray, " n"]:
    """Sorted latents: so many random live ones, all live ones, or those named (dead ones too)."""
    if isinstance(wanted, tuple):
        wrong = [latent for latent in wanted if not 0 <= latent < len(firings)]
        if wrong:
            raise InterpError(f"no latent {wrong[0]}: the dictionary has latents 0 to {len(firings) - 1}")
        return np.array(sorted(set(wanted)), dtype=np.int64)
    live = (firings >= min_firings).nonzero()[0]
    if not len(live):
        raise InterpError(
            f"no latent fires at {min_firings} or more tokens (the busiest: {int(firings.max(initial=0))}); "
            "read more tokens or lower min_firings"
        )
    if wanted == "all" or wanted >= len(live):
        return live
    drawn = torch.randperm(len(live), generator=torch_generator(seed, "pages")).numpy()[:wanted]
    return np.sort(live[drawn])


def stand_ins(
    firings: Int[np.ndarray, " d_dict"], latents: Int[np.ndarray, " n"], *, min_firings: int, seed: int
) -> Int[np.ndarray, " n"]:
    """For each latent an equally frequent other live one; -1 where it never fires or there is no other."""
    live = (firings >= min_firings).nonzero()[0]
    order = live[np.argsort(firings[live], kind="stable")]
    sizes = firings[order]
    found = np.full(len(latents), -1, dtype=np.int64)
    for i, latent in enumerate(latents.tolist()):
        place = int(np.searchsorted(sizes, firings[latent]))
        near = order[max(0, place - NEAREST) : place + NEAREST + 1]
        near = near[near != latent]
        if firings[latent] and len(near):
            gaps = np.abs(firings[near] - firings[latent])
            near = near[np.argsort(gaps, kind="stable")[:NEAREST]]
            found[i] = near[numpy_generator(seed, "stand-in", latent).integers(len(near))]
    return found
