"""Where does a latent fire? The tokens of held-out text at which it is most active, in their context.

Latents are drawn at random among those that fire often enough, never chosen for being readable: a gallery of chosen
latents says nothing about the dictionary. Fewer held-out tokens mean weaker examples; look before you name a latent.
"""

from __future__ import annotations

import pandas as pd
import torch

from interp.core.errors import InterpError
from interp.core.seed import torch_generator
from interp.dictionaries.base import Dictionary, rows
from interp.dictionaries.heldout import BLOCK, HeldOut

COLUMNS = ("latent", "density", "rank", "activation", "before", "token", "after", "sequence", "pos")
MIN_FIRINGS = 3
"""Latents that fire at fewer held-out tokens are not shown."""


@torch.no_grad()
def top_examples(
    dictionary: Dictionary, data: HeldOut, *, n_latents: int = 20, n_examples: int = 5, window: int = 6, seed: int = 0
) -> pd.DataFrame:
    """One row per example: the token, up to `window` tokens either side, and how active the latent is there."""
    if n_latents < 1 or n_examples < 1 or window < 0:
        raise InterpError(
            f"n_latents={n_latents} and n_examples={n_examples} must be at least 1, window={window} at least 0"
        )
    parts = [dictionary.encode(block) for block in rows(data.tokens, BLOCK)]
    values, indices = (
        torch.cat([part.values for part in parts]).cpu(),
        torch.cat([part.indices for part in parts]).cpu(),
    )
    counts = torch.bincount(indices[values != 0].long(), minlength=dictionary.d_dict)
    live = (counts >= MIN_FIRINGS).nonzero()[:, 0]
    order = torch.randperm(len(live), generator=torch_generator(seed, "examples"))
    where = data.keep.nonzero()
    found: list[tuple[object, ...]] = []
    for latent in live[order[:n_latents]].sort().values.tolist():
        token, slot = ((indices == latent) & (values != 0)).nonzero(as_tuple=True)
        strength = values[token, slot]
        for rank, best in enumerate(strength.argsort(descending=True, stable=True)[:n_examples].tolist(), 1):
            sequence, pos = where[token[best]].tolist()
            text = data.record.strings[sequence]
            before, after = "".join(text[max(0, pos - window) : pos]), "".join(text[pos + 1 : pos + 1 + window])
            density = int(counts[latent]) / len(values)
            found.append((latent, density, rank, float(strength[best]), before, text[pos], after, sequence, pos))
    return pd.DataFrame(found, columns=list(COLUMNS))
