"""What does the model lose when a latent is zeroed where it fires?

    x'_t = x_t + decode(codes_t without the latent) - decode(codes_t)      at every counted token t of the row

The dictionary's error stays as it is, so only the latent is taken out. The number of an example is the rise of the
next-token loss at its token, in nats; the rise at the other tokens shown comes from the same forward pass. Rows are cut
after the last token shown, which changes nothing in a causal model.
Null: at the same tokens the direction of an equally frequent other latent is taken out, at equal norm. It asks whether
any push of this size would cost as much.
Trap: a latent that fires with another of the same meaning costs little alone (self-repair, redundancy): a small number
does not say that the latent means nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from interp.core.progress import track
from interp.core.sites import Site
from interp.dictionaries.base import Dictionary
from interp.instrument.capture import capture
from interp.instrument.edits import Context, Edit, edited
from interp.instrument.tokens import TokenRecord, from_ids
from interp.models.model import LoadedModel

LOGITS = 2**26
"""Logits of one forward pass, at most: a quarter of a gigabyte in float32."""
MAX_ROWS = 16


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
class Run:
    """A batch of jobs of about equal length, ready to run."""

    jobs: Sequence[Job]
    record: TokenRecord
    counted: Bool[Tensor, "job pos"]


def ablate(
    model: LoadedModel,
    dictionary: Dictionary,
    read: Site,
    write: Site,
    jobs: Sequence[Job],
    ids: dict[int, Int[Tensor, " pos"]],
    counted: dict[int, Bool[Tensor, " pos"]],
) -> Effects:
    """All jobs, grouped by length. `read` is where the dictionary looks, `write` what its decoder predicts."""
    waiting = sorted(jobs, key=lambda job: (min(job.end, len(ids[job.row])), job.row, job.latent))
    batches: list[list[Job]] = []
    for job in waiting:
        length = min(job.end, len(ids[job.row]))
        room = max(1, min(MAX_ROWS, LOGITS // (length * (model.dims.d_vocab or 1))))
        if not batches or len(batches[-1]) >= room:
            batches.append([])
        batches[-1].append(job)
    features = dictionary.features
    found: Effects = {}
    for batch in track(batches, "zeroing latents"):
        found |= _effects(model, dictionary, features, read, write, _padded(model, batch, ids, counted))
    return found


def _padded(model: LoadedModel, jobs: Sequence[Job], ids: dict[int, Tensor], counted: dict[int, Tensor]) -> Run:
    rows = [ids[job.row][: job.end] for job in jobs]
    width = max(map(len, rows))
    table = torch.zeros(len(rows), width, dtype=torch.int64)
    mask, kept = (torch.zeros(len(rows), width, dtype=torch.bool) for _ in range(2))
    for i, (job, row) in enumerate(zip(jobs, rows, strict=True)):
        table[i, : len(row)], mask[i, : len(row)] = row, True
        kept[i, : len(row)] = counted[job.row][: len(row)]
    return Run(jobs=jobs, record=from_ids(model, table, mask), counted=kept)


@torch.no_grad()
def _effects(
    model: LoadedModel, dictionary: Dictionary, features: Tensor, read: Site, write: Site, run: Run
) -> Effects:
    with capture(model, read, stop=False) as acts:
        before = next_losses(model(run.record), run.record)
    x = acts[read].flatten(2)
    own, other = _changes(dictionary, features, x, run)
    after = _losses_with(model, write, own, run)
    has_null = any(job.null >= 0 for job in run.jobs)
    null = _losses_with(model, write, other, run) if has_null else before
    found: Effects = {}
    for i, job in enumerate(run.jobs):
        n = int(run.record.mask[i].sum())
        rises = (after[i] - before[i]).tolist()
        for pos, start, end in job.windows:
            loss = tuple(rises[t] if t + 1 < n else None for t in range(start, end))
            known = job.null >= 0 and pos + 1 < n
            found[job.latent, job.row, pos] = Effect(
                loss=loss, loss_null=float(null[i, pos] - before[i, pos]) if known else None
            )
    return found


def _changes(dictionary: Dictionary, features: Tensor, x: Tensor, run: Run) -> tuple[Tensor, Tensor]:
    """What is added at each token: the latent taken out, and its stand-in's direction at the same norm."""
    where = run.counted.to(x.device)
    flat = x[where].to(features.device, features.dtype)
    codes = dictionary.encode(flat)
    latent = torch.tensor([job.latent for job in run.jobs])
    mine = latent[run.counted.nonzero()[:, 0]].to(codes.indices.device)[:, None] == codes.indices
    without = codes.with_values(torch.where(mine, 0, codes.values))
    change = dictionary.decode(without) - dictionary.decode(codes)
    change = torch.where((mine & (codes.values != 0)).any(1, keepdim=True), change, 0)
    null = torch.tensor([max(job.null, 0) for job in run.jobs])[run.counted.nonzero()[:, 0]].to(features.device)
    push = -F.normalize(features[null], dim=1) * change.norm(dim=1, keepdim=True)
    shape = (*run.counted.shape, change.shape[1])
    placed = [change.new_zeros(shape), change.new_zeros(shape)]
    for into, value in zip(placed, (change, push), strict=True):
        into[where.to(into.device)] = value
    return placed[0], placed[1]


def _losses_with(model: LoadedModel, write: Site, change: Tensor, run: Run) -> Float[Tensor, "job pos"]:
    def function(x: Tensor, _: Context) -> Tensor:
        return x + change.to(x.device, x.dtype).reshape(x.shape)

    touched = change.abs().sum(-1).cpu() > 0
    if not bool(touched.any()):
        return next_losses(model(run.record), run.record)
    with edited(model, Edit(write, function, at=touched, label="zero a latent")):
        return next_losses(model(run.record), run.record)


def next_losses(logits: Float[Tensor, "batch pos d_vocab"], record: TokenRecord) -> Float[Tensor, "batch pos"]:
    """-log p(next token) at each token, float64 on the cpu; what stands at a row's last token means nothing."""
    targets = record.ids.roll(-1, dims=1).to(logits.device)
    rows = [F.cross_entropy(row.float(), target, reduction="none") for row, target in zip(logits, targets, strict=True)]
    return torch.stack(rows).double().cpu()
