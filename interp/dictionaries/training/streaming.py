"""Batches straight from the model: captured, masked, shuffled in a buffer, used, forgotten.

The batches of the input are run in a shuffled order, a new one each epoch, in chunks of about `n_buffer` tokens. Half
of each chunk, chosen at random, waits for the next chunk; a block is what waited and the other half, shuffled:

    block_c = shuffle( late half of chunk c-1, early half of chunk c )

so a batch mixes tokens of two chunks of sequences, as with a buffer that is refilled when it is half empty. Because
a token waits for one chunk at most, the buffer never has to be saved: a position is (block, offset), and two chunks are
captured again when a run goes on. Each process of a group runs its own chunks (lane r of R takes chunks r, R + r, ...).
Memory: about 2.5 `n_buffer` tokens at every site while a chunk is captured. Trap: a buffer that holds few sequences
shuffles little; take at least some hundred (`n_buffer` over the length of a sequence).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from interp.core.errors import InterpError
from interp.core.seed import torch_generator
from interp.dictionaries.loss_gradients import inner_tokens, next_token_loss
from interp.dictionaries.sinks import ordinary
from interp.dictionaries.training.job import Batch, Job, gradient_key
from interp.dictionaries.training.sources import Masks, check_part, first_of_rows
from interp.instrument.capture import capture
from interp.instrument.stream import Batch as Inputs
from interp.instrument.stream import Batches
from interp.instrument.stream_rows import Rows, run_batch
from interp.models.model import LoadedModel

MEDIAN_TOKENS = 8192
"""Tokens, at least, from which the median norm of a site is taken."""


class ModelSource:
    """A shuffle buffer over a capture."""

    def __init__(
        self,
        model: LoadedModel,
        batches: Batches,
        sites: Iterable[str],
        batch_size: int,
        *,
        seed: int,
        masks: Masks | None = None,
        n_buffer: int = 65_536,
        gradients: Iterable[str] = (),
        part: tuple[int, int] = (0, 1),
    ) -> None:
        """gradients: sites at which batches also hold d(next-token loss) / d(site), under `gradient_key`."""
        self.model, self.batches, self.seed, self.part = model, batches, seed, part
        self.sites = tuple(model.resolve(list(sites)))
        self.gradients = tuple(model.resolve(list(gradients))) if (gradients := tuple(gradients)) else ()
        if missing := [str(site) for site in self.gradients if site not in self.sites]:
            raise InterpError(f"gradients at {missing} need these sites to be captured too")
        self.masks, self.batch_size, self.whole_batch = masks or Masks(), check_part(part, batch_size), batch_size
        if n_buffer < self.batch_size:
            raise InterpError(f"n_buffer={n_buffer} must hold at least a batch of {self.batch_size} tokens")
        if batches.n_batches < 1:
            raise InterpError("the input is empty: there is no batch to capture")
        self.n_buffer = n_buffer
        per_batch = (batches.n_tokens or batches.batch(0).n_tokens * batches.n_batches) / batches.n_batches
        self.chunk_batches = max(1, round(n_buffer / max(per_batch, 1)))
        self.block, self.offset = 0, 0
        """Of the next token."""
        self._limits: dict[str, float] | None = None
        self._late: tuple[int, Batch] | None = None
        self._held: tuple[int, Batch] | None = None

    def next(self) -> Batch:
        parts: list[Batch] = []
        missing = self.batch_size
        while missing:
            held = self._tokens_of(self.block)
            n = len(held[str(self.sites[0])])
            taken = min(missing, n - self.offset)
            parts.append({key: value[self.offset : self.offset + taken] for key, value in held.items()})
            missing, self.offset = missing - taken, self.offset + taken
            if self.offset == n:
                self.block, self.offset, self._held = self.block + 1, 0, None
        return _joined(parts)

    def sample(self, n: int) -> Batch:
        parts: list[Batch] = []
        found = 0
        for number in self._order(0).tolist():
            parts.append(self._kept(self.batches.batch(number), self.limits))
            found += len(parts[-1][str(self.sites[0])])
            if found >= n:
                break
        return {key: value[:n] for key, value in _joined(parts).items()}

    def captured(self, number: int) -> Batch:
        """The tokens of one input batch that the masks on text let through."""
        return self._kept(self.batches.batch(number), {})

    def state(self) -> dict[str, Any]:
        return {"block": self.block, "offset": self.offset, "limits": self.limits}

    def restore(self, state: dict[str, Any]) -> None:
        self.block, self.offset = int(state["block"]), int(state["offset"])
        self._limits = {site: float(limit) for site, limit in state["limits"].items()}
        self._late = self._held = None

    def described(self) -> dict[str, Any]:
        return {
            "input": self.batches.hash, "cut": self.batches.cut, "weights": self.model.weight_hash,
            "sites": [str(site) for site in self.sites], "gradients": [str(site) for site in self.gradients],
            "batch_size": self.whole_batch, "seed": self.seed, "masks": asdict(self.masks),
            "n_buffer": self.n_buffer, "lanes": self.part[1],
        }  # fmt: skip

    @property
    def limits(self) -> dict[str, float]:
        """Median norm of each site, over the first tokens that the other masks let through."""
        if self._limits is None:
            norms: dict[str, list[Tensor]] = {str(site): [] for site in self.sites}
            n = 0
            for number in self._order(0).tolist() if self.masks.drop_norm else ():
                found = self._kept(self.batches.batch(number), {})
                for site in norms:
                    norms[site].append(found[site].float().norm(dim=-1))
                n += len(found[str(self.sites[0])])
                if n >= MEDIAN_TOKENS:
                    break
            self._limits = {site: float(torch.cat(parts).median()) for site, parts in norms.items() if n}
        return self._limits

    def _order(self, epoch: int) -> Tensor:
        return torch.randperm(self.batches.n_batches, generator=torch_generator(self.seed, "stream", epoch))

    def _numbers(self, chunk: int) -> Iterator[int]:
        """Numbers of the batches of a chunk of this lane."""
        rank, lanes = self.part
        start, n = (chunk * lanes + rank) * self.chunk_batches, self.batches.n_batches
        order: tuple[int, list[int]] = (-1, [])
        for at in range(start, start + self.chunk_batches):
            if order[0] != at // n:
                order = (at // n, self._order(at // n).tolist())
            yield order[1][at % n]

    def _halves(self, chunk: int) -> tuple[Batch, Batch]:
        """The tokens of a chunk that are used at once, and those that wait."""
        found = _joined([self._kept(self.batches.batch(number), self.limits) for number in self._numbers(chunk)])
        n = len(found[str(self.sites[0])])
        if n == 0:
            raise InterpError("the masks leave no token of the model's input; loosen them, or take longer sequences")
        order = self._shuffle("chunk", chunk, n)
        return _rows(found, order[n // 2 :]), _rows(found, order[: n // 2])

    def _tokens_of(self, block: int) -> Batch:
        if self._held is None or self._held[0] != block:
            self._held = None  # free it first
            waited = self._late if self._late is not None and self._late[0] == block - 1 else None
            before = [] if block == 0 else [waited[1] if waited else self._halves(block - 1)[1]]
            early, late = self._halves(block)
            self._late = (block, late)
            mixed = _joined([*before, early])
            self._held = (block, _rows(mixed, self._shuffle("block", block, len(mixed[str(self.sites[0])]))))
        return self._held[1]

    def _shuffle(self, what: str, number: int, n: int) -> Tensor:
        return torch.randperm(n, generator=torch_generator(self.seed, what, *self.part, number))

    def _kept(self, batch: Inputs, limits: dict[str, float]) -> Batch:
        """Activations of the tokens of one forward that the masks let through; norms only with limits."""
        found, rows = self._run(batch)
        keep = _text_mask(rows, batch, self.masks)
        if self.gradients and batch.record is not None:  # the last token of a sequence has none
            keep &= inner_tokens(batch.record)[rows.kept]
        for site, limit in limits.items():
            keep &= ordinary(found[site], self.masks.drop_norm, median=limit).cpu()
        index = keep.nonzero()[:, 0]
        return _rows(found, index)

    def _run(self, batch: Inputs) -> tuple[Batch, Rows]:
        if not self.gradients:
            rows = run_batch(self.model, batch, self.sites)
            return {str(site): rows[site].flatten(1) for site in self.sites}, rows
        if batch.record is None:
            raise InterpError("the gradient of the next-token loss needs an input of text")
        with torch.enable_grad(), capture(self.model, self.sites, grad=True) as acts:
            next_token_loss(self.model(batch.record), batch.record).backward()
        rows = Rows(batch, self.sites, acts)
        slopes = Rows(batch, self.gradients, {site: acts.grad(site) for site in self.gradients})
        found = {str(site): rows[site].flatten(1) for site in self.sites}
        return found | {gradient_key(str(site)): slopes[site].flatten(1) for site in self.gradients}, rows


def _text_mask(rows: Rows, batch: Inputs, masks: Masks) -> Bool[Tensor, " n"]:
    keep = torch.ones(len(rows), dtype=torch.bool)
    if batch.record is None:
        return keep
    if masks.drop_special:
        keep &= ~batch.record.special[rows.kept]
    if masks.drop_first:
        keep &= ~first_of_rows(rows.tokens[0], rows.tokens[1])
    return keep


def _rows(batch: Batch, index: Tensor) -> Batch:
    return {key: value.index_select(0, index.to(value.device)) for key, value in batch.items()}


def _joined(parts: Sequence[Batch]) -> Batch:
    return parts[0] if len(parts) == 1 else {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def gradient_sites(jobs: Sequence[Job]) -> tuple[str, ...]:
    """Sites at which some job asks for the model's gradient."""
    return tuple(dict.fromkeys(s for job in jobs if job.wants_gradient for s in job.writes or job.reads))
