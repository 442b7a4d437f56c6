"""What does the model lose when a latent is zeroed where it fires?

    x'_t = x_t + decode(codes_t without the latent) - decode(codes_t)      at every counted token t of the row

The dictionary's error stays as it is, so only the latent is taken out. The number of an example is the rise of the
next-token loss at its token, in nats; the rise at the other tokens shown comes from the same forward pass. In a causal
model nothing changes before the first firing or depends on what comes after the last token shown: the row is cut
there, and keys and values of the tokens before are those of the untouched run where the model keeps them in full.
Null: at the same tokens the direction of an equally frequent other latent is taken out, at equal norm. It asks whether
any push of this size would cost as much.
Trap: a latent that fires with another of the same meaning costs little alone (self-repair, redundancy): a small number
does not say that the latent means nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from interp.core.progress import track
from interp.core.sites import Site
from interp.dictionaries.base import Dictionary
from interp.instrument.capture import capture
from interp.instrument.edits import Context, Edit, edited
from interp.models.model import LoadedModel


@dataclass(frozen=True, kw_only=True)
class Job:
    """One latent in one row: which tokens to look at."""

    latent: int
    null: int
    """The latent that stands in for it, -1 for none."""
    row: int
    windows: tuple[tuple[int, int, int], ...]
    """Per example: position of its token, of the first token shown, and of the last one plus 1."""

    @property
    def end(self) -> int:
        """Tokens of the row that have to be run: the last one shown, and the one that it predicts."""
        return max(end for _, _, end in self.windows) + 1


@dataclass(frozen=True, kw_only=True)
class Effect:
    """Rises of the next-token loss at one example."""

    loss: tuple[float | None, ...]
    """At each token shown; None where nothing follows."""
    loss_null: float | None
    """At the example's token."""


Effects = dict[tuple[int, int, int], Effect]
"""By latent, row and position."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Base:
    """The untouched run of one row, and what the dictionary makes of it."""

    ids: Int[Tensor, "1 pos"]
    counted: Bool[Tensor, " pos"]
    losses: Float[Tensor, " pos"]
    x: Float[Tensor, "pos d_in"]
    """Where the dictionary reads."""
    cache: Any
    """Keys and values of all positions; None where the model does not keep them in full."""


class Ablation:
    """A model, a dictionary, and where it reads and writes."""

    def __init__(self, model: LoadedModel, dictionary: Dictionary, read: Site, write: Site) -> None:
        self.model, self.dictionary, self.read, self.write = model, dictionary, read, write
        self.features = dictionary.features.detach()

    def run(
        self, jobs: Sequence[Job], ids: dict[int, Int[Tensor, " pos"]], counted: dict[int, Bool[Tensor, " pos"]]
    ) -> Effects:
        """All jobs, row by row; `ids` and `counted` hold the rows they name."""
        by_row: dict[int, list[Job]] = {}
        for job in jobs:
            by_row.setdefault(job.row, []).append(job)
        found: Effects = {}
        for row in track(sorted(by_row), "zeroing latents"):
            end = max(job.end for job in by_row[row])
            base = self.base(ids[row][:end], counted[row][:end])
            for job in by_row[row]:
                found |= self._effects(job, base)
        return found

    @torch.no_grad()
    def base(self, ids: Int[Tensor, " pos"], counted: Bool[Tensor, " pos"]) -> Base:
        """The untouched run of one row."""
        model, row = self.model, ids[None].to(self.model.device)
        cache: Any = None
        with capture(model, self.read, stop=False) as acts:
            if model.is_transformers and hasattr(model.module.config, "use_cache"):
                out = cast(Any, model.module)(input_ids=row, use_cache=True)
                logits, cache = out.logits, getattr(out, "past_key_values", None)
            else:
                logits = model(row)
        return Base(
            ids=row,
            counted=counted,
            losses=next_losses(logits, row)[0],
            x=acts[self.read][0].flatten(1),
            cache=cache if keeps_all(cache) else None,
        )

    def changes(self, job: Job, base: Base) -> Float[Tensor, "2 pos d_out"]:
        """What is added at each token: the latent taken out, and its stand-in's direction at the same norm."""
        features = self.features
        x = base.x[base.counted.to(base.x.device)].to(features.device, features.dtype)
        codes = self.dictionary.encode(x)
        mine = codes.indices == job.latent
        without = codes.with_values(torch.where(mine, 0, codes.values))
        change = self.dictionary.decode(without) - self.dictionary.decode(codes)
        change = torch.where((mine & (codes.values != 0)).any(1, keepdim=True), change, 0)
        push = torch.zeros_like(change)
        if job.null >= 0:
            push = -F.normalize(features[job.null], dim=0) * change.norm(dim=1, keepdim=True)
        placed = change.new_zeros(2, len(base.counted), change.shape[1])
        placed[:, base.counted.to(placed.device)] = torch.stack([change, push])
        return placed

    @torch.no_grad()
    def _effects(self, job: Job, base: Base) -> Effects:
        length = min(job.end, base.ids.shape[1])
        change = self.changes(job, base)[:, :length]
        fires = (change[0].abs().sum(-1) > 0).nonzero()[:, 0]
        rises = torch.zeros(2, length, dtype=torch.float64)
        if len(fires):
            start = int(fires[0]) if base.cache is not None else 0
            after = self._losses(base, change, start)
            rises[:, start:] = after - base.losses[start:length]
        n = base.ids.shape[1]
        own, null = rises.tolist()
        return {
            (job.latent, job.row, pos): Effect(
                loss=tuple(own[t] if t + 1 < n else None for t in range(first, end)),
                loss_null=null[pos] if job.null >= 0 and pos + 1 < n else None,
            )
            for pos, first, end in job.windows
        }

    def _losses(self, base: Base, change: Tensor, start: int) -> Float[Tensor, "2 pos"]:
        """Losses from `start` on, with each of two changes added."""

        def function(x: Tensor, context: Context) -> Tensor:
            here = change[:, context.where.to(change.device)]
            return x + here.to(x.device, x.dtype).reshape(x.shape)

        ids = base.ids[:, : change.shape[1]].expand(2, -1)
        past = {"past_key_values": _cut(base.cache, start), "use_cache": True} if start else {}
        touched = change.abs().sum(-1).cpu() > 0
        with edited(self.model, Edit(self.write, function, at=touched, label="zero a latent")):
            logits = self.model(ids[:, start:], **past)
        return next_losses(logits, ids[:, start:])


def keeps_all(cache: Any) -> bool:
    """Whether a cache holds the keys and values of every position: no sliding window, no recurrent state."""
    layers = getattr(cache, "layers", None)
    return bool(layers) and all(type(layer).__name__ == "DynamicLayer" for layer in layers)


def _cut(cache: Any, n_pos: int) -> Any:
    """The first positions of a cache of one row, for two rows; the original is not touched."""
    made = copy.copy(cache)
    made.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in made.layers:
        layer.keys = layer.keys[:, :, :n_pos].expand(2, -1, -1, -1)
        layer.values = layer.values[:, :, :n_pos].expand(2, -1, -1, -1)
    return made


def next_losses(
    logits: Float[Tensor, "batch pos d_vocab"], ids: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos"]:
    """-log p(next token) at each token, float64 on the cpu; 0 at the last one, which predicts nothing here."""
    targets = ids.roll(-1, dims=1).to(logits.device)
    rows = [F.cross_entropy(row.float(), target, reduction="none") for row, target in zip(logits, targets, strict=True)]
    losses = torch.stack(rows).double().cpu()
    losses[:, -1] = 0
    return losses
