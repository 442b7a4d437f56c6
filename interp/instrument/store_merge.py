"""Several stores as one, and more rows for a store, without capturing or copying what is there.

A merged store has the shards of its parts, in order, as hard links where the file system allows them (else copies), so
the parts may be deleted. Row numbers go on from part to part: the manifest says what to add to those of each shard.
Its key is the hash of the keys of its parts, so merging in steps gives the same store as merging at once.
Parts must agree in model, sites, columns and dtype. The same input twice is refused: a row would count double.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from interp.core.errors import ArtefactError, InterpError
from interp.core.hash import hash_json
from interp.instrument.shards import FORMAT, MANIFEST, VERSION, read_sidecar, shard_name, sidecar_name
from interp.instrument.store import ActivationStore
from interp.instrument.store_capture import assemble
from interp.instrument.store_folders import Folder, open_folder
from interp.instrument.store_plan import Plan, StoreConfig
from interp.instrument.store_ranks import Ranks, locked
from interp.instrument.store_writer import as_json
from interp.instrument.stream import Batches
from interp.instrument.tokens import TokenRecord
from interp.models.model import LoadedModel


def merge(stores: Iterable[ActivationStore], folder: Folder | Path | str) -> ActivationStore:
    """One store of the rows of all, in `folder/<key>`; one that already exists is opened instead."""
    listed = list(stores)
    if len(listed) < 2:
        raise InterpError(f"{len(listed)} store given; merging takes two or more")
    for other in listed[1:]:
        _check_same(listed[0], other)
    parts: list[dict[str, Any]] = [part for store in listed for part in store.manifest["parts"]]
    _check_distinct(listed, parts)
    plan = _plan(listed, parts)
    target = open_folder(folder).child(plan.key)
    try:
        if not target.exists(MANIFEST):
            target.make()
            with locked(target.local, Ranks()):
                plan.write(target)
                assemble(target, plan, offsets=_link(listed, target), parts=parts)
    except OSError as error:
        raise ArtefactError(f"could not write {target}: {error}; free space or choose another folder") from error
    return ActivationStore.open(target)


MODEL = ("weight_hash", "config_hash", "dtype")
"""What of a model activations follow from."""


def append(
    store: ActivationStore,
    model: LoadedModel,
    data: TokenRecord | Batches,
    folder: Folder | Path | str,
    config: StoreConfig | None = None,
) -> ActivationStore:
    """A new store of the rows of `store` and those of `data`, captured at the same sites in the same dtype.

    The rows of `data` are first captured as a store of their own in `folder`, so a kill loses what it loses there.
    """
    known = store.manifest["model"]
    if [known.get(name) for name in MODEL] != [model.weight_hash, model.config_hash, str(model.dtype)]:
        raise InterpError(
            f"{store.key} holds activations of {known['source']} with other weights, or another configuration, than "
            f"{model.source}"
        )
    wanted = replace(config or StoreConfig(), dtype=store.manifest["dtype"])
    added = ActivationStore.write(model, data, list(store.sites), folder, wanted)
    return merge([store, added], folder)


def _check_same(first: ActivationStore, other: ActivationStore) -> None:
    for what in ("sites", "dtype", "columns"):
        if first.manifest[what] != other.manifest[what]:
            ours, theirs = first.manifest[what], other.manifest[what]
            raise InterpError(f"{first.key} and {other.key} differ in {what}: {ours} and {theirs}; capture them alike")
    ours, theirs = ({name: s.manifest["model"].get(name) for name in MODEL} for s in (first, other))
    if ours != theirs:
        raise InterpError(f"{first.key} and {other.key} are of different models: {ours} and {theirs}")


def _check_distinct(stores: Sequence[ActivationStore], parts: Sequence[dict[str, Any]]) -> None:
    seen: set[str] = set()
    for part in parts:
        if part["input"] in seen:
            raise InterpError(f"the input {part['input']} comes twice: its rows would count double; leave one out")
        seen.add(part["input"])
    for store in stores:
        for shard in store.manifest["shards"]:
            if shard["sha256"] in seen:
                raise InterpError(f"{store.folder / shard['file']} comes twice: its rows would count double")
            seen.add(shard["sha256"])


def _plan(stores: Sequence[ActivationStore], parts: Sequence[dict[str, Any]]) -> Plan:
    first, n_shards = stores[0].manifest, sum(len(store.sizes) for store in stores)
    return Plan(
        key=hash_json({"format": [FORMAT, VERSION], "parts": [part["key"] for part in parts]}),
        sites=first["sites"],
        columns=first["columns"],
        dtype=first["dtype"],
        input_hash=hash_json([part["input"] for part in parts]),
        cut=f"{len(parts)} stores, merged",
        n_batches=n_shards,
        n_tokens=sum(map(len, stores)),
        batches_per_shard=1,
        model=first["model"],
        versions=first["versions"],
    )


def _link(stores: Sequence[ActivationStore], target: Folder) -> list[int]:
    """Every shard under its new number, with its sidecar; returns what is added to the row numbers of each."""
    offsets: list[int] = []
    before = 0
    for store in stores:
        for shard in store.manifest["shards"]:
            name = shard_name(len(offsets))
            entry = {k: v for k, v in shard.items() if k != "row_offset"} | {"file": name}
            if read_sidecar(target, name) != entry:
                target.take(store.folder, shard["file"], name)
                target.write(sidecar_name(name), [as_json(entry)])
            offsets.append(before + shard["row_offset"])
        before += store.manifest["rows"]
    return offsets
