"""What will a capture cost? Tokens, bytes on disk, peak memory and time, before it starts.

Two batches are really run: the first one also warms up, the second one is timed and weighed. Bytes on disk follow from
the stored columns of the trial (exact per token; statistics and headers add a fixed part per shard). Peak memory is
what the process holds after the trial, and at least what it held before and three times the activations of one batch
(as the model made them, in the store's dtype, and back); and two shards, one being written while the next is captured.
A job that will not fit is refused with the flag that makes it fit.
Trap: the time is this machine's at this moment, and later batches may be longer than the two that were tried.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import disk_usage

import psutil

from interp.core.errors import InterpError
from interp.core.sites import Site
from interp.instrument.shards import PAGE
from interp.instrument.statistics import Statistics
from interp.instrument.store_encode import Encoded, encode_batch
from interp.instrument.store_plan import StoreConfig, make_plan, store_key
from interp.instrument.stream import Batch, Batches
from interp.models.model import LoadedModel

SPARE = 0.9
"""Share of the free memory or disk that a job may plan to use."""
SLOW_SECONDS = 60.0
"""From here on the advice says how several processes would share the work."""


@dataclass(frozen=True, kw_only=True)
class CapturePlan:
    """What a capture will need, and what this machine has."""

    n_batches: int
    n_tokens: int
    sites: tuple[str, ...]
    dtype: str
    n_shards: int
    disk_bytes: int
    disk_free: int | None
    """`None` for a folder that is not local."""
    memory_bytes: int
    """Peak of this process, the model included."""
    memory_free: int
    """What this process holds plus what the system has available."""
    seconds: float
    tokens_per_second: float
    refusals: tuple[str, ...]
    """Why the job will not fit, each with the flag that makes it fit; empty if it fits."""

    def check(self) -> CapturePlan:
        """The plan, if the job fits. Raises InterpError with the reasons."""
        if self.refusals:
            raise InterpError("this capture will not fit: " + "; ".join(self.refusals))
        return self


def plan_capture(
    model: LoadedModel,
    batches: Batches,
    sites: Sequence[Site],
    config: StoreConfig,
    folder: Path | None = None,
    *,
    n_processes: int = 1,
) -> CapturePlan:
    """Try two batches and add up. `folder` is where the store will lie, `None` if that is not this machine's disk.

    n_processes: how many share this machine's memory; what the others hold already is no longer available.
    """
    before = psutil.Process().memory_info().rss
    first = _tried(model, batches.batch(0), sites, config.dtype)
    numbers = {0, batches.n_batches // 2}
    began = time.perf_counter()
    trial = encode_batch(model, batches.batch(max(numbers)), sites, config.dtype)
    seconds = time.perf_counter() - began
    tried = max(1, len(trial.columns["row"]))
    n_first = max(1, len(first.columns["row"]))
    n_tokens = batches.n_tokens or math.ceil(batches.n_batches * (tried + n_first) / 2)
    plan = make_plan(model, batches, first, config, store_key(model, batches, sites, config.dtype))
    per_token = sum(math.ceil(c.numel() * c.element_size() / n_first) for c in first.columns.values())
    fixed = PAGE + sum(_statistics_bytes(found) for found in first.statistics.values())
    disk = n_tokens * per_token + plan.n_shards * (fixed + 512) + fixed
    shard = per_token * plan.batches_per_shard * max(tried, n_first) + fixed
    held = psutil.Process().memory_info().rss
    raw = sum(_raw_bytes(part, model) for part in (first, trial)) // 2
    memory = max(held, before + 3 * raw) + 2 * min(shard, disk)
    made = CapturePlan(
        n_batches=batches.n_batches,
        n_tokens=n_tokens,
        sites=tuple(map(str, sites)),
        dtype=config.dtype,
        n_shards=plan.n_shards,
        disk_bytes=disk,
        disk_free=None if folder is None else disk_usage(_existing(folder)).free,
        memory_bytes=memory,
        memory_free=held + psutil.virtual_memory().available,
        seconds=seconds * n_tokens / tried,
        tokens_per_second=tried / seconds,
        refusals=(),
    )
    return replace(made, refusals=tuple(_refusals(made, shard, (memory - held) * (n_processes - 1))))


def _tried(model: LoadedModel, batch: Batch, sites: Sequence[Site], dtype: str) -> Encoded:
    """The first batch; a model that will not take inputs of this shape is the user's news, not a crash."""
    try:
        return encode_batch(model, batch, sites, dtype)
    except (ValueError, TypeError, RuntimeError, IndexError, AttributeError) as error:
        if isinstance(error, InterpError) or batch.inputs is None:
            raise
        shape = tuple(batch.inputs.shape)
        raise InterpError(f"{model.source} does not take an input of shape {shape}: {error}") from error


def _raw_bytes(part: Encoded, model: LoadedModel) -> int:
    """Activations of one batch as the model makes them."""
    rows = len(part.columns["row"])
    return sum(rows * math.prod(shape) * model.dtype.itemsize for shape in part.shapes.values())


def _statistics_bytes(found: Statistics) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in found.tensors().values())


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())


def _refusals(plan: CapturePlan, shard: int, others: int) -> list[str]:
    found: list[str] = []
    if plan.disk_free is not None and plan.disk_bytes > SPARE * plan.disk_free:
        fits = int(SPARE * plan.disk_free / plan.disk_bytes * plan.n_tokens)
        smaller = "" if plan.dtype == "int8" else ", or --store-dtype int8"
        found.append(
            f"it needs {size_text(plan.disk_bytes)} of disk and {size_text(plan.disk_free)} are free: "
            f"--tokens {fits}{smaller}, fewer --sites, or --out on another disk"
        )
    if plan.memory_bytes + others > SPARE * plan.memory_free:
        flag = "--shard-bytes" if 2 * shard > (plan.memory_bytes - 2 * shard) / 2 else "--rows-per-forward"
        need, free = size_text(plan.memory_bytes + others), size_text(plan.memory_free)
        found.append(
            f"it needs {need} of memory and {free} are to be had: "
            f"a lower {flag}, {'fewer processes, ' if others else ''}or fewer --sites"
        )
    return found


def size_text(n_bytes: float) -> str:
    """`1.4 GB`, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"
