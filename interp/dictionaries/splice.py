"""What does the model lose when a dictionary's reconstruction replaces the activation?

    loss_recovered = (CE_zero - CE_sae) / (CE_zero - CE_base)

CE is the next-token cross-entropy in nats. 1 means that the model does not notice, 0 that the reconstruction is worth
no more than zeros. Tokens that the dictionary was not trained on (massive activations) keep their own activation in
every condition, zero ablation included, so that the conditions differ in one thing only.
Beware: zero ablation is destructive, so the ratio flatters; report the losses themselves beside it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from interp.core.errors import InterpError
from interp.core.progress import track
from interp.core.sites import Site
from interp.dictionaries.base import Dictionary
from interp.instrument.edits import Context, Edit, edited
from interp.instrument.tokens import TokenRecord
from interp.models.model import LoadedModel

Losses = Float[Tensor, "sequence"]
"""Summed cross-entropy of each sequence's predicted tokens, float64, nats."""


def sequence_losses(logits: Float[Tensor, "batch pos d_vocab"], record: TokenRecord) -> Losses:
    """Sum over predicted real tokens of -log p(next token), per sequence."""
    ids = record.ids.to(logits.device)
    real = (record.mask[:, 1:] & record.mask[:, :-1]).to(logits.device)
    losses = torch.stack(
        [
            F.cross_entropy(row[:-1].float(), target[1:], reduction="none")
            for row, target in zip(logits, ids, strict=True)
        ]
    )
    return torch.where(real, losses, 0).double().sum(1).cpu()


def n_predicted(record: TokenRecord) -> int:
    """Number of tokens that have a real predecessor."""
    return int((record.mask[:, 1:] & record.mask[:, :-1]).sum())


def splice(site: Site, dictionary: Dictionary, keep: Bool[Tensor, "batch pos"]) -> Edit:
    """The edit that puts the reconstruction where `keep` is true; heads and their width are read as one axis."""

    def function(x: Tensor, _: Context) -> Tensor:
        return dictionary.decode(dictionary.encode(x.float().flatten(2))).reshape(x.shape).to(x)

    return Edit(site, function, at=keep, label=f"splice {type(dictionary).__name__}")


@torch.no_grad()
def spliced_losses(
    model: LoadedModel,
    record: TokenRecord,
    site: Site,
    conditions: dict[str, Dictionary | None],
    keep: Bool[Tensor, "batch pos"],
    *,
    batch_size: int | None = None,
) -> dict[str, Losses]:
    """Losses per sequence with each dictionary spliced in at the kept tokens; `None` is the untouched model."""
    if keep.shape != record.ids.shape:
        raise InterpError(f"keep has shape {tuple(keep.shape)}, the tokens {tuple(record.ids.shape)}")
    if not bool(keep.any()):
        raise InterpError("no token is left to replace; loosen the rule that drops massive activations")
    batch_size = batch_size or _rows_per_forward(model, record)
    jobs = [(name, start) for start in range(0, len(record), batch_size) for name in conditions]
    found: dict[str, list[Tensor]] = {name: [] for name in conditions}
    for name, start in track(jobs, "evaluating spliced losses"):
        rows, chosen = record.rows(slice(start, start + batch_size)), keep[start : start + batch_size]
        dictionary = conditions[name]
        run = _runner(model, rows, site, dictionary, chosen)
        found[name].append(sequence_losses(run(), rows))
    return {name: torch.cat(parts) for name, parts in found.items()}


def _rows_per_forward(model: LoadedModel, record: TokenRecord) -> int:
    """As many sequences as keep the logits under half a gigabyte, at most 16."""
    logits = record.ids.shape[1] * (model.dims.d_vocab or 1)
    return max(1, min(16, 2**27 // logits))


def _runner(
    model: LoadedModel, rows: TokenRecord, site: Site, dictionary: Dictionary | None, keep: Tensor
) -> Callable[[], Tensor]:
    if dictionary is None or not bool(keep.any()):
        return lambda: model(rows)

    def run() -> Tensor:
        with edited(model, splice(site, dictionary, keep)):
            return model(rows)

    return run


def loss_recovered(zero: float, spliced: float, base: float) -> float | None:
    """(CE_zero - CE_sae) / (CE_zero - CE_base); None where zero ablation costs nothing, so that there is no scale."""
    return None if zero <= base else (zero - spliced) / (zero - base)
