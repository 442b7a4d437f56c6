"""Where batches come from, and where in the data a run is: a store on disk here, the model itself in `streaming`.

A source gives the same batches in the same order whenever it is asked again, and its position is a few numbers, which
a checkpoint keeps: `state()` and `restore()`. Nothing of what was read has to be saved.

    token t of the stream is number t % n of the shuffled order of epoch t // n ;  batch i is tokens iB .. (i+1)B - 1

so the leftover of an epoch opens the next one, and any batch can be read without those before it. Several processes
that share the tokens read the same batches and keep their part of the rows each: their union is what one reads.
Which tokens may be drawn is said by `Masks`: special tokens, first positions and massive activations are left out
unless asked for. A token is left out at all sites if it is massive at one, so that sites stay aligned.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.core.errors import InterpError
from interp.core.seed import torch_generator
from interp.dictionaries.sinks import ordinary
from interp.dictionaries.training.job import Batch, Job, check_jobs
from interp.instrument.store import ActivationStore


@dataclass(frozen=True, kw_only=True)
class Masks:
    """Which tokens a dictionary is not trained on."""

    drop_special: bool = True
    """Leave out the tokenizer's special tokens."""
    drop_first: bool = True
    """Leave out the first token of every sequence: a sink in most models."""
    drop_norm: float = 10.0
    """Leave out tokens whose norm exceeds this multiple of the median norm of the site; 0 keeps them."""

    def __post_init__(self) -> None:
        if self.drop_norm < 0:
            raise InterpError(f"drop_norm={self.drop_norm} must be positive, or 0 to keep every token")


@runtime_checkable
class Source(Protocol):
    """An endless stream of batches that knows where it is."""

    batch_size: int
    """Tokens in each batch of this process."""

    def next(self) -> Batch:
        """The next batch."""
        ...

    def sample(self, n: int) -> Batch:
        """About n tokens to start from, without moving; fewer where there are fewer, the same in every process."""
        ...

    def state(self) -> dict[str, Any]:
        """The position, as JSON values."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a position."""
        ...

    def described(self) -> dict[str, Any]:
        """What the stream depends on, as JSON values: a run goes on only with an equal one."""
        ...


def sites_of(jobs: Sequence[Job]) -> tuple[str, ...]:
    """Every site that some job needs, once, in order."""
    check_jobs(jobs)
    return tuple(dict.fromkeys(site for job in jobs for site in job.sites))


def first_of_rows(row: Int[Tensor, " n"], pos: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """True for the token of least position in each row."""
    if len(row) == 0:
        return torch.zeros(0, dtype=torch.bool)
    _, number = row.unique(return_inverse=True)
    least = torch.full((int(number.max()) + 1,), torch.iinfo(torch.int64).max)
    return pos == least.scatter_reduce(0, number, pos, "amin")[number]


def check_part(part: tuple[int, int], batch_size: int) -> int:
    """Rows of a batch that one of several processes takes."""
    rank, world = part
    if not 0 <= rank < world:
        raise InterpError(f"part {rank} of {world}; parts run from 0 to {world - 1}")
    if batch_size < 1 or batch_size % world:
        raise InterpError(f"batch_size={batch_size} does not divide among {world} processes; make it a multiple")
    return batch_size // world


class StoreSource:
    """Shuffled tokens of a store, several sites aligned."""

    def __init__(
        self,
        store: ActivationStore,
        sites: Iterable[str],
        batch_size: int,
        *,
        seed: int,
        masks: Masks | None = None,
        special_ids: Sequence[int] = (),
        part: tuple[int, int] = (0, 1),
    ) -> None:
        """batch_size: tokens of a batch, over all processes. part: (number, of how many) of this process."""
        self.store, self.sites, self.seed, self.part = store, tuple(map(str, sites)), seed, part
        self.masks, self.special_ids = masks or Masks(), tuple(sorted(special_ids))
        self.batch_size, self.whole_batch = check_part(part, batch_size), batch_size
        self.pool = allowed(store, self.sites, self.masks, self.special_ids).nonzero()[:, 0]
        if len(self.pool) == 0:
            raise InterpError("no token of the store is left to train on; loosen the masks")
        self.number = 0
        """Of the next batch."""
        self._epoch: tuple[int, Tensor] = (-1, self.pool)

    def next(self) -> Batch:
        rank, start = self.part[0], self.number * self.whole_batch
        index = self._tokens(start + rank * self.batch_size, self.batch_size)
        self.number += 1
        return self._read(index)

    def sample(self, n: int) -> Batch:
        return self._read(self._tokens(0, min(n, len(self.pool))))

    def state(self) -> dict[str, Any]:
        return {"batch": self.number}

    def restore(self, state: dict[str, Any]) -> None:
        self.number = int(state["batch"])

    def described(self) -> dict[str, Any]:
        return {
            "store": self.store.key, "sites": list(self.sites), "batch_size": self.whole_batch, "seed": self.seed,
            "masks": asdict(self.masks), "special_ids": list(self.special_ids),
        }  # fmt: skip

    def _tokens(self, start: int, n: int) -> Int[Tensor, " n"]:
        """Numbers of n tokens of the stream, from one on."""
        parts: list[Tensor] = []
        while n:
            epoch, offset = divmod(start, len(self.pool))
            here = self._order(epoch)[offset : offset + n]
            parts.append(here)
            start, n = start + len(here), n - len(here)
        return torch.cat(parts)

    def _order(self, epoch: int) -> Int[Tensor, " n"]:
        if self._epoch[0] != epoch:
            order = torch.randperm(len(self.pool), generator=torch_generator(self.seed, "store", epoch))
            self._epoch = (epoch, self.pool[order])
        return self._epoch[1]

    def _read(self, index: Tensor) -> Batch:
        return {site: self.store.take(site, index).flatten(1) for site in self.sites}


def allowed(
    store: ActivationStore, sites: Sequence[str], masks: Masks, special_ids: Sequence[int] = ()
) -> Bool[Tensor, " n"]:
    """True for the tokens of a store that masks let through. `drop_norm` reads every site once, from end to end."""
    ids, row, pos = store.tokens()
    keep = torch.ones(len(store), dtype=torch.bool)
    if masks.drop_first:
        keep &= ~first_of_rows(row, pos)
    if masks.drop_special and ids is not None and special_ids:
        keep &= ~torch.isin(ids, torch.tensor(list(special_ids)))
    text = keep.clone()
    for site in sites if masks.drop_norm and bool(text.any()) else ():
        norms = store.norms(site)
        keep &= ordinary(norms[:, None], masks.drop_norm, median=float(norms[text].median()))
    return keep
