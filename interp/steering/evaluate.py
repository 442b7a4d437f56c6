"""What adding a vector does: to the behaviour, on held-out prompts, and to everything else, on neutral text.

propensity   m(x) = log P(words for | x) - log P(words against | x), next token, probabilities summed over the words
effect       m(x, steered) - m(x)
cost         mean over neutral tokens of KL(P_base || P_steered), in nats; and the ratio of the perplexities
Several vectors are evaluated as rows of one batch, and only the blocks after the site are run again, from the stream
of one base run (any other network is run whole, with an edit). Prompts of equal length run together: no padding.
The first token and attention-sink candidates are not steered: what they hold is not content, and moving it mostly
breaks the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.core.errors import InterpError
from interp.core.sites import Part, Site
from interp.instrument.blocks import BlockRunner
from interp.instrument.edits import add, edited
from interp.instrument.tokens import TokenRecord, adds_start, sink_candidates, tokenize
from interp.models.model import LoadedModel

TOKENS_PER_PASS = 1024
"""Tokens per forward: more saves no time on a CPU and costs memory."""


@dataclass(frozen=True, kw_only=True)
class Readout:
    """Which next tokens count for the behaviour, and which against it."""

    ids_for: tuple[int, ...]
    ids_against: tuple[int, ...]
    notes: tuple[str, ...] = ()

    def propensity(self, logits: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows"]:
        """log P(for) - log P(against); the normaliser of the softmax cancels."""
        wide = logits.double()
        return wide[..., list(self.ids_for)].logsumexp(-1) - wide[..., list(self.ids_against)].logsumexp(-1)


def readout(model: LoadedModel, words_for: Sequence[str], words_against: Sequence[str]) -> Readout:
    """First tokens of the words as they stand after a space; the two sides must not share one."""
    sides = [[_first_token(model, word) for word in side] for side in (words_for, words_against)]
    ids_for, ids_against = ({token for token, _ in side} for side in sides)
    if not ids_for or not ids_against or ids_for & ids_against:
        raise InterpError(
            f"words for {list(words_for)} and against {list(words_against)} must begin with different tokens of "
            f"{model.source}; choose others"
        )
    cut = sum(not whole for side in sides for _, whole in side)
    notes = (f"{cut} of the words are several tokens; their first token is read",) if cut else ()
    return Readout(ids_for=tuple(sorted(ids_for)), ids_against=tuple(sorted(ids_against)), notes=notes)


def _first_token(model: LoadedModel, word: str) -> tuple[int, bool]:
    """Id of the first token that is not only a space, and whether it is the whole word."""
    record = tokenize(model, f" {word}")
    pieces = record.str_tokens(0)
    index = next((i for i, piece in enumerate(pieces) if piece.strip()), 0)
    return int(record.ids[0, index]), index == len(pieces) - 1


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences of one length, and where in them a vector is added."""

    model: LoadedModel
    record: TokenRecord
    where: Bool[Tensor, "batch pos"]
    rows: tuple[int, ...]
    """Their numbers in the list they came from."""

    @cached_property
    def runner(self) -> BlockRunner | None:
        """A base run to go on from; `None` where single blocks cannot be run."""
        family = self.model.table.family
        ready = family is not None and {Part.FINAL_NORM, Part.LOGITS, Part.RESID_POST} <= set(family.parts)
        if not ready or not self.model.is_transformers:
            return None
        return BlockRunner(self.model, self.record.ids, sites=("resid_post.*",))

    @cached_property
    def logits(self) -> Float[Tensor, "batch pos vocab"]:
        """Logits of the untouched model."""
        return self.model(self.record.ids) if self.runner is None else self.runner.logits


def steerable(model: LoadedModel, record: TokenRecord, *, sinks: bool = False) -> Bool[Tensor, "batch pos"]:
    """Positions that are steered: real tokens but the first and, unless `sinks`, attention-sink candidates."""
    if sinks:
        return record.mask
    where = record.mask & ~sink_candidates(model, record)
    where[torch.arange(len(record)), record.first] = False
    return where


def batches(model: LoadedModel, texts: Sequence[str], *, sinks: bool = False) -> list[Batch]:
    """Texts grouped by their number of tokens, in order of their first appearance; see `read_last` on start tokens."""
    start = adds_start(model)
    records = [tokenize(model, text, add_special=start) for text in texts]
    groups: dict[int, list[int]] = {}
    for row, record in enumerate(records):
        groups.setdefault(record.ids.shape[1], []).append(row)
    found: list[Batch] = []
    for rows in groups.values():
        record = tokenize(model, [texts[row] for row in rows], add_special=start)
        found.append(Batch(model, record, steerable(model, record, sinks=sinks), tuple(rows)))
    return found


def steered_logits(
    batch: Batch, site: str, vectors: Float[Tensor, "vector d"], *, last_only: bool
) -> Float[Tensor, "vector batch pos vocab"]:
    """Logits with each vector added at the batch's steerable positions."""
    resolved = batch.model.table.one(site)
    per_pass = max(1, TOKENS_PER_PASS // batch.record.ids.numel())
    partial = resolved.part is Part.RESID_POST and batch.runner is not None
    run = _from_site if partial else _whole
    return torch.cat([run(batch, resolved, chunk, last_only) for chunk in vectors.split(per_pass)])


def _from_site(batch: Batch, site: Site, vectors: Tensor, last_only: bool) -> Tensor:
    """Run the blocks after the site, from the base run's stream."""
    runner = batch.runner
    assert runner is not None and site.layer is not None
    base = runner.base[site]
    change = vectors.to(base)[:, None, None] * batch.where.to(base)[..., None]
    resid = (base + change).flatten(0, 1)
    rows = torch.arange(len(base), device=base.device).repeat(len(vectors))
    for layer in range(site.layer + 1, batch.model.n_layers):
        resid = runner.block(layer, resid, rows)
    return runner.head(resid[:, -1:] if last_only else resid).unflatten(0, (len(vectors), len(base)))


def _whole(batch: Batch, site: Site, vectors: Tensor, last_only: bool) -> Tensor:
    """Run the whole model with an edit."""
    n_rows = len(batch.record)
    rows = vectors.repeat_interleave(n_rows, dim=0)[:, None, :]
    ids, where = batch.record.ids.repeat(len(vectors), 1), batch.where.repeat(len(vectors), 1)
    with edited(batch.model, add(site, rows, at=where)):
        logits: Tensor = batch.model(ids)
    return (logits[:, -1:] if last_only else logits).unflatten(0, (len(vectors), n_rows))


def propensities(
    prompts: Sequence[Batch], reading: Readout, site: str, vectors: Float[Tensor, "vector d"]
) -> Float[Tensor, "vector prompt"]:
    """m of every prompt under every vector, prompts in their original order."""
    out = torch.empty(len(vectors), sum(len(batch.rows) for batch in prompts), dtype=torch.float64)
    for batch in prompts:
        logits = steered_logits(batch, site, vectors, last_only=True)
        out[:, list(batch.rows)] = reading.propensity(logits[:, :, 0]).cpu()
    return out


@dataclass(frozen=True, eq=False)
class Neutral:
    """Neutral text with the model's own predictions on it."""

    batch: Batch

    @cached_property
    def base(self) -> Float[Tensor, "batch pos vocab"]:
        """Log-probabilities of the untouched model."""
        return self.batch.logits.float().log_softmax(-1)

    def cost(self, site: str, vectors: Float[Tensor, "vector d"]) -> Float[Tensor, "vector 2"]:
        """(KL in nats per steered token, perplexity ratio) of each vector."""
        found: list[Tensor] = []
        for vector in vectors:
            steered = steered_logits(self.batch, site, vector[None], last_only=False)[0].float().log_softmax(-1)
            each = torch.nn.functional.kl_div(steered, self.base, log_target=True, reduction="none").sum(-1)
            kl = each[self.batch.where.to(each.device)].mean()
            ratio = (self._loss(steered) - self._loss(self.base)).exp()
            found.append(torch.stack([kl, ratio]).double().cpu())
        return torch.stack(found)

    def _loss(self, log_probs: Tensor) -> Tensor:
        targets = self.batch.record.ids[:, 1:, None].to(log_probs.device)
        return -log_probs[:, :-1].gather(-1, targets).mean()


def slope(strengths: Float[Tensor, " s"], values: Float[Tensor, "s prompt"]) -> Float[Tensor, " prompt"]:
    """Least-squares slope of each prompt's value against the strength."""
    centred = strengths.double() - strengths.double().mean()
    return (centred[:, None] * (values - values.mean(0))).sum(0) / centred.square().sum()
