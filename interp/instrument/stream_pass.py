"""In-pass analyses: what can be said of activations as they stream by, without a store and without a second pass.

    top, massive = TopExamples(10), MassiveActivations()
    observe(model, RecordBatches(record, 8), ["resid_post.*"], [top, massive])
    ActivationStore.write(model, record, "resid_post.*", folder, observers=[top, massive])    # while writing

An observer sees every batch once, keeps a bounded summary, and can be merged with that of another process: under
torchrun each process sees its share, and afterwards every process holds the whole. Summaries travel as safetensors.
What is here: `stream_observers` (statistics, massive activations) and `stream_top` (examples of each coordinate).
Trap: observers see what the model computed; a store holds it rounded to its dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from interp.core.errors import InterpError
from interp.core.progress import track
from interp.core.sites import Site
from interp.instrument.store_ranks import Ranks
from interp.instrument.stream import Batch, Batches, RecordBatches
from interp.instrument.stream_rows import Rows, run_batch
from interp.instrument.tokens import TokenRecord
from interp.models.model import LoadedModel


@runtime_checkable
class Observer(Protocol):
    """Something that looks at batches as they stream."""

    def update(self, batch: Batch, acts: Rows) -> None:
        """Take in one batch; `acts[site]` has a row per real token, `acts.tokens` says which."""
        ...

    def result(self) -> Any:
        """What was found so far."""
        ...

    def state(self) -> dict[str, Tensor]:
        """All that was found, as named tensors."""
        ...

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Take in what another observer, set up alike, has found in other batches."""
        ...

    def clear(self) -> None:
        """Forget everything."""
        ...


def observe(
    model: LoadedModel,
    data: TokenRecord | Batches,
    sites: str | Site | Iterable[str | Site],
    observers: Sequence[Observer],
    *,
    ranks: Ranks | None = None,
) -> None:
    """Run all batches through the model once, and show them to the observers."""
    if not observers:
        raise InterpError("there are no observers; a pass without one finds nothing")
    batches = RecordBatches(data) if isinstance(data, TokenRecord) else data
    found, ranks = model.resolve(sites), ranks or Ranks.current()
    check_ranks(observers, ranks)
    for number in track(range(ranks.rank, batches.n_batches, ranks.world), "observing activations"):
        show(run_batch(model, batches.batch(number), found), observers)
    gather(observers, ranks)


def show(rows: Rows, observers: Iterable[Observer]) -> None:
    """One batch to every observer."""
    for observer in observers:
        observer.update(rows.batch, rows)


def check_ranks(observers: Sequence[Observer], ranks: Ranks) -> None:
    """Several processes can only put together what they saw if they can talk."""
    if observers and ranks.world > 1 and not (dist.is_available() and dist.is_initialized()):
        raise InterpError(
            f"observers in {ranks.world} processes need a process group: torch.distributed.init_process_group('gloo')"
        )


def gather(observers: Sequence[Observer], ranks: Ranks) -> None:
    """Afterwards the observers of every process hold what all processes saw, merged in the order of ranks."""
    if ranks.world == 1:
        return
    for observer in observers:
        states = [load(part) for part in _exchange(save(_contiguous(observer.state())), ranks)]
        observer.clear()
        for state in states:
            observer.merge(state)


def _contiguous(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _exchange(mine: bytes, ranks: Ranks) -> list[bytes]:
    """The bytes of every process, in the order of ranks."""
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(ranks.world)]
    dist.all_gather(sizes, torch.tensor([len(mine)]))
    longest = max(int(size) for size in sizes)
    sent = torch.zeros(longest, dtype=torch.uint8)
    sent[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
    received = [torch.zeros(longest, dtype=torch.uint8) for _ in range(ranks.world)]
    dist.all_gather(received, sent)
    return [part[: int(size)].numpy().tobytes() for part, size in zip(received, sizes, strict=True)]
