"""Capturing into a store: each process writes its shards, the first one puts the manifest on top.

For every shard of this rank that is not there yet: run its batches, encode them, gather their statistics, hand the
shard to the writer. No process waits for another until its own shards are written. A capture that was killed and is
run again writes only the shards that are missing; the finished folder has the same bytes either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.dropout import _DropoutNd  # pyright: ignore[reportPrivateUsage]

from interp.core.errors import ArtefactError, InterpError
from interp.core.progress import track
from interp.core.sites import Site
from interp.instrument.foreign import watched
from interp.instrument.shards import (
    FORMAT,
    MANIFEST,
    PLAN,
    STATISTICS,
    VERSION,
    read_sidecar,
    serialise,
    shard_name,
)
from interp.instrument.statistics import Statistics
from interp.instrument.store_encode import Encoded, encode_batch
from interp.instrument.store_folders import TEMPORARY, Folder
from interp.instrument.store_plan import Plan, StoreConfig, make_plan, store_key
from interp.instrument.store_ranks import LOCK, Ranks, locked
from interp.instrument.store_reader import read_statistics
from interp.instrument.store_writer import ShardWriter, as_json, sha256
from interp.instrument.stream import Batches
from interp.instrument.stream_pass import Observer, check_ranks, gather, observe, show
from interp.instrument.stream_rows import run_batch
from interp.models.model import LoadedModel


def write_store(
    model: LoadedModel,
    batches: Batches,
    sites: Sequence[Site],
    parent: Folder,
    config: StoreConfig,
    ranks: Ranks,
    observers: Sequence[Observer] = (),
) -> Folder:
    """The folder `parent/<key>` with a complete store in it. Observers have then seen the whole input.

    What lies there already is run again for them, without being written again.
    """
    check_ranks(observers, ranks)
    if model.hub.pending:  # edited activations must not be found later under the untouched model's name
        raise InterpError("a capture or an edit of this model is open; write the store outside it")
    if random := _random(model):
        raise InterpError(f"{model.source} is in training mode, where {random} is not repeatable; call .eval() on it")
    if batches.n_batches < 1:
        raise InterpError("the input is empty: there is no batch to capture")
    folder = parent.child(store_key(model, batches, sites, config.dtype))
    try:
        with watched(model.module) as n_foreign:
            if folder.exists(MANIFEST):
                sweep(folder)
                if observers:
                    observe(model, batches, sites, observers, ranks=ranks)
                elif n_foreign:  # so that a hook that changes something does not get the untouched model's store
                    run_batch(model, batches.batch(0), sites)
            else:
                if folder.names() and not folder.exists(PLAN) and any(not n.startswith(".") for n in folder.names()):
                    raise ArtefactError(f"{folder} exists and is not an activation store; choose another folder")
                _Job(model, batches, sites, folder, config, ranks, observers).run()
    except OSError as error:
        raise ArtefactError(_stopped(folder, error)) from error
    return folder


def _random(model: LoadedModel) -> str | None:
    """A module whose values differ from one forward to the next, or depend on the other rows."""
    for path, module in model.module.named_modules():
        drops = getattr(module, "p", 0.0) if isinstance(module, _DropoutNd) else getattr(module, "dropout", 0.0)
        random = isinstance(module, _BatchNorm) or (isinstance(drops, float) and drops > 0)
        if module.training and (random or (not path and model.is_transformers)):
            return path or type(module).__name__
    return None


def _stopped(folder: Folder, error: OSError) -> str:
    try:
        n_done = sum(name.endswith(".safetensors") and name != STATISTICS for name in folder.names())
    except OSError:
        n_done = 0
    kept = f"; {n_done} shards are kept, run the same capture again to go on" if n_done else ""
    return f"could not write {folder}: {error}; free space or choose another folder{kept}"


@dataclass
class _Job:
    """One process's share of a capture."""

    model: LoadedModel
    batches: Batches
    sites: Sequence[Site]
    folder: Folder
    config: StoreConfig
    ranks: Ranks
    observers: Sequence[Observer] = ()
    trial: dict[int, Encoded] = field(default_factory=dict[int, Encoded])
    """The first batch, run to learn the shapes; used again where it is needed and nobody else has to see it."""

    def run(self) -> None:
        plan = Plan.read(self.folder)
        fresh = self._fresh(plan)
        self.folder.make()
        with locked(self.folder.local, self.ranks):
            plan = Plan.read(self.folder) or fresh  # another rank may have been faster
            plan = plan.go_on(fresh, self.folder)
            if not self.folder.exists(PLAN) and not self.folder.exists(MANIFEST):
                plan.write(self.folder)
            self._shards(plan)
            self.ranks.barrier()
            if self.ranks.rank == 0:
                names = [shard_name(number) for number in range(plan.n_shards)]
                self.ranks.wait(lambda: sum(map(self._there, names)), len(names), "the other processes' shards")
                assemble(self.folder, plan)
            else:
                self.ranks.wait(lambda: int(self.folder.exists(MANIFEST)), 1, "the manifest")
        self.ranks.barrier()
        gather(self.observers, self.ranks)

    def _fresh(self, found: Plan | None) -> Plan:
        """What would be planned now; the shapes come from the plan found, or from running the first batch."""
        key = store_key(self.model, self.batches, self.sites, self.config.dtype)
        if found is None:
            self.trial[0] = encode_batch(self.model, self.batches.batch(0), self.sites, self.config.dtype)
            return make_plan(self.model, self.batches, self.trial[0], self.config, key)
        columns = {name: torch.empty(1) for name in found.columns} | {"row": torch.empty(1)}
        shapes = {site: tuple(shape) for site, shape in found.sites.items()}
        blank = Encoded(columns=columns, statistics={}, error={}, shapes=shapes)
        return make_plan(self.model, self.batches, blank, self.config, key)

    def _there(self, name: str) -> bool:
        return read_sidecar(self.folder, name) is not None

    def _encode(self, number: int) -> Encoded:
        found = self.trial.pop(number, None)
        if found is not None and not self.observers:
            return found
        return encode_batch(self.model, self.batches.batch(number), self.sites, self.config.dtype, self.observers)

    def _shards(self, plan: Plan) -> None:
        mine = self.ranks.mine(plan.n_shards)
        missing = [s for s in mine if not self._there(shard_name(s))]
        for name in self.folder.names():  # what a killed process left of these shards
            if name.endswith(TEMPORARY) and any(shard_name(s) in name for s in missing):
                self.folder.remove(name)
        with ShardWriter(self.folder) as writer:
            for shard in track(missing, "capturing activations"):
                writer.submit(shard, self._parts(plan, shard))
        for shard in mine if self.observers else ():  # what a killed process has written, it did not tell
            for number in plan.batches_of(shard) if shard not in missing else ():
                show(run_batch(self.model, self.batches.batch(number), self.sites), self.observers)

    def _parts(self, plan: Plan, shard: int) -> dict[str, list[Tensor]]:
        """The columns of a shard, a piece per batch, and the statistics of its rows."""
        columns: dict[str, list[Tensor]] = {}
        statistics: dict[str, Statistics] = {}
        error = dict.fromkeys(plan.sites, (0.0, 0.0))
        for number in plan.batches_of(shard):
            part = self._encode(number)
            if {site: list(shape) for site, shape in part.shapes.items()} != plan.sites:
                raise InterpError(f"batch {number} has shapes {part.shapes}, the first one had {plan.sites}")
            for name, column in part.columns.items():
                columns.setdefault(name, []).append(column)
            for site, found in part.statistics.items():
                statistics[site] = statistics[site].merge(found) if site in statistics else found
                error[site] = (error[site][0] + part.error[site][0], error[site][1] + part.error[site][1])
        return columns | {name: [value] for name, value in statistics_columns(statistics, error).items()}


def statistics_columns(statistics: dict[str, Statistics], error: dict[str, tuple[float, float]]) -> dict[str, Tensor]:
    """As they lie in a file."""
    columns = {f"{site}/statistics/{k}": v for site, found in statistics.items() for k, v in found.tensors().items()}
    return columns | {f"{site}/statistics/error": torch.tensor(v, dtype=torch.float64) for site, v in error.items()}


def assemble(
    folder: Folder, plan: Plan, *, offsets: Sequence[int] | None = None, parts: Sequence[dict[str, Any]] = ()
) -> None:
    """Merge the statistics of all shards and write the manifest.

    offsets: what is added to the row numbers of each shard; only a merged store has any, and `parts`.
    """
    shards: list[dict[str, Any]] = []
    statistics: dict[str, Statistics] = {}
    error = dict.fromkeys(plan.sites, (0.0, 0.0))
    for number in range(plan.n_shards):
        entry = read_sidecar(folder, shard_name(number))
        if entry is None:
            raise ArtefactError(f"{folder / shard_name(number)} has gone; run the same capture again")
        offset = 0 if offsets is None else offsets[number]
        shards.append({**entry, "row_offset": offset})
        for site, (found, part) in read_statistics(folder, entry["file"], plan.sites).items():
            found = found.moved(offset)
            statistics[site] = statistics[site].merge(found) if site in statistics else found
            error[site] = (error[site][0] + part[0], error[site][1] + part[1])
    blocks = serialise({name: [value] for name, value in statistics_columns(statistics, error).items()})
    folder.write(STATISTICS, blocks)
    rows = max(shard["rows"] + shard["row_offset"] for shard in shards)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "key": plan.key,
        "sites": plan.sites,
        "columns": plan.columns,
        "dtype": plan.dtype,
        "tokens": sum(shard["tokens"] for shard in shards),
        "rows": rows,
        "input": {"hash": plan.input_hash, "cut": plan.cut},
        "model": plan.model,
        "versions": plan.versions,
        "relative_error": {site: (e / total) ** 0.5 if total else 0.0 for site, (e, total) in error.items()},
        "summary": {site: found.summary() for site, found in statistics.items()},
        "statistics": {"file": STATISTICS, "bytes": sum(map(len, blocks)), "sha256": sha256(blocks)},
        "shards": shards,
        "parts": list(parts) or [{"key": plan.key, "input": plan.input_hash, "rows": rows}],
    }
    folder.sync()
    folder.write(MANIFEST, [as_json({**manifest, "checksum": sha256([as_json(manifest)])})])
    folder.sync()
    sweep(folder)


def sweep(folder: Folder) -> None:
    """Remove what killed processes left in a complete store: drafts, and the locks of ranks that are no more."""
    for name in folder.names():
        if name.startswith(".") and (name.endswith(TEMPORARY) or LOCK in name):
            folder.remove(name)
