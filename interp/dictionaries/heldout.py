"""Dictionaries side by side on text that none of them has seen: FVU, L0, dead latents, and what the model loses.

Everything is kept per sequence, because sequences are the independent units: tokens of one text are not. FVU of a
sequence is its squared error over the mean variance per sequence of the whole set, so that the mean over sequences is
the FVU of the set, and a bootstrap over sequences resamples what can be resampled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.core.errors import InterpError
from interp.core.sites import Site
from interp.dictionaries.base import Dictionary, rows
from interp.dictionaries.metrics import Evaluation, evaluate
from interp.dictionaries.sinks import ordinary
from interp.dictionaries.splice import n_predicted, spliced_losses
from interp.instrument.capture import capture
from interp.instrument.tokens import TokenRecord
from interp.models.model import LoadedModel

BLOCK = 2048
"""Tokens encoded at once."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOut:
    """Activations of unseen text."""

    record: TokenRecord
    site: Site
    x: Float[Tensor, "batch pos d"]
    """On the device of the model."""
    keep: Bool[Tensor, "batch pos"]
    """Tokens that count: real, and not a massive activation."""

    @property
    def tokens(self) -> Float[Tensor, "n d"]:
        """Activations of the tokens that count."""
        return self.x[self.keep.to(self.x.device)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """One dictionary on held-out text."""

    evaluation: Evaluation
    fvu: Float[Tensor, "sequence"]
    """Per sequence; their mean is `evaluation.fvu`."""
    ce: Float[Tensor, "sequence"]
    """Cross-entropy with the dictionary spliced in, nats per predicted token; their mean is the loss of the set."""


@torch.no_grad()
def held_out(
    model: LoadedModel, record: TokenRecord, site: Site, *, drop_norm: float, median: float, batch_size: int = 8
) -> HeldOut:
    """Capture a site on unseen text and mark the tokens that count; median is that of the training norms.

    Heads and their width become one axis.
    """
    parts: list[Tensor] = []
    for start in range(0, len(record), batch_size):
        with capture(model, site) as acts:
            model(record.rows(slice(start, start + batch_size)))
        parts.append(acts[site].float().flatten(2))
    x = torch.cat(parts)
    keep = record.mask & ordinary(x, drop_norm, median=median).cpu()
    if drop_norm:
        keep &= torch.arange(x.shape[1]) != record.first[:, None]
    if not bool(keep.any(dim=1).all()):
        raise InterpError("a held-out sequence keeps no token; lengthen the sequences or raise drop_norm")
    return HeldOut(record=record, site=site, x=x, keep=keep)


@torch.no_grad()
def sequence_fvu(dictionary: Dictionary, data: HeldOut) -> Float[Tensor, "sequence"]:
    """Squared error of each sequence over the mean variance per sequence."""
    flat = data.tokens
    x_hat = torch.cat([dictionary.decode(dictionary.encode(block)) for block in rows(flat, BLOCK)])
    errors = torch.zeros(data.keep.shape, dtype=torch.float64)
    errors[data.keep] = (flat - x_hat).double().square().sum(1).cpu()
    variance = float((flat.double() - flat.double().mean(0)).square().sum())
    return errors.sum(1) * len(errors) / variance


def score(model: LoadedModel, data: HeldOut, dictionaries: dict[str, Dictionary]) -> tuple[dict[str, Scores], Tensor]:
    """Scores by name, and the per-sequence loss of the untouched model."""
    losses = spliced_losses(model, data.record, data.site, {"": None, **dictionaries}, data.keep)
    per_token = len(data.record) / n_predicted(data.record)
    scores = {
        name: Scores(
            evaluation=evaluate(dictionary, rows(data.tokens, BLOCK)),
            fvu=sequence_fvu(dictionary, data),
            ce=losses[name] * per_token,
        )
        for name, dictionary in dictionaries.items()
    }
    return scores, losses[""] * per_token
