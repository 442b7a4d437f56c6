"""What is wrong with a folder that should hold an activation store? Nothing is trusted, nothing is changed.

Every file is read once: sizes, checksums, headers and sidecars against the manifest, row counts against the headers,
and for files that do not belong there, pickles above all (they run code when they are loaded). A store in the making
is audited as far as it has come. An empty list means: every byte is as it was written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp.core.errors import ArtefactError
from interp.instrument.shards import (
    MANIFEST,
    PLAN,
    STATISTICS,
    file_problem,
    read_header,
    read_manifest,
    read_sidecar,
    shard_name,
    sidecar_name,
)
from interp.instrument.store_folders import TEMPORARY, Folder, open_folder
from interp.instrument.store_plan import Plan
from interp.instrument.store_ranks import LOCK
from interp.instrument.store_writer import as_json, sha256

PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt", ".joblib", ".npy", ".npz")
"""Endings of files that may hold a pickle."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong."""

    file: str
    problem: str
    """Reads on after the file's name: `is missing`."""
    advice: str

    def __str__(self) -> str:
        return f"{self.file} {self.problem}; {self.advice}"


AGAIN = "delete the folder and capture again"


def audit(folder: Folder | Path | str) -> list[Finding]:
    """All findings for one store folder; an empty list is a clean bill."""
    where = open_folder(folder)
    if not where.exists():
        return [Finding(file=str(where), problem="is missing", advice="check the path")]
    try:
        return [*(_complete(where) if where.exists(MANIFEST) else _unfinished(where)), *_strangers(where)]
    except OSError as error:
        return [Finding(file=str(where), problem=f"cannot be read: {error}", advice="check permissions and the disk")]


def _complete(folder: Folder) -> Iterator[Finding]:
    try:
        manifest = read_manifest(folder)
    except ArtefactError as error:
        yield Finding(file=MANIFEST, problem=f"is not valid: {error}", advice=AGAIN)
        return
    if manifest.get("checksum") != sha256([as_json({k: v for k, v in manifest.items() if k != "checksum"})]):
        yield Finding(file=MANIFEST, problem="was changed after it was written", advice=AGAIN)
    for entry in manifest["shards"]:
        yield from _shard(folder, entry, manifest)
    try:
        problem = file_problem(folder, manifest["statistics"], checksums=True)
    except (KeyError, TypeError) as error:
        problem = f"is not described by the manifest: {error}"
    if problem:
        yield Finding(file=STATISTICS, problem=problem, advice=AGAIN)
    yield from _plan(folder, manifest)


def _shard(folder: Folder, entry: Mapping[str, Any], manifest: Mapping[str, Any] | None) -> Iterator[Finding]:
    name = str(entry["file"])
    problem = file_problem(folder, entry, checksums=True)
    if problem:
        yield Finding(file=name, problem=problem, advice=AGAIN if manifest else "delete it, then capture again")
        return
    try:
        header = read_header(folder, name)
    except ArtefactError as error:
        yield Finding(file=name, problem=f"has no valid header: {error}", advice=AGAIN)
        return
    if manifest is None:
        return
    for column in (*manifest["columns"], *manifest["sites"]):
        if column not in header:
            yield Finding(file=name, problem=f"lacks the column {column}", advice=AGAIN)
        elif header[column].shape != (entry["tokens"], *manifest["sites"].get(column, ())):
            shown = f"{header[column].shape} for {entry['tokens']} tokens"
            yield Finding(file=name, problem=f"holds {column} of shape {shown}", advice=AGAIN)
    sidecar, told = sidecar_name(name), {k: v for k, v in entry.items() if k != "row_offset"}
    if read_sidecar(folder, name) != told:
        problem = "does not match the manifest" if folder.exists(sidecar) else "is missing"
        yield Finding(file=sidecar, problem=problem, advice="one of the two was changed; " + AGAIN)


def _plan(folder: Folder, manifest: Mapping[str, Any]) -> Iterator[Finding]:
    try:
        plan = Plan.read(folder)
    except ArtefactError as error:
        yield Finding(file=PLAN, problem=f"is not valid: {error}", advice=AGAIN)
        return
    if plan is None:
        yield Finding(file=PLAN, problem="is missing", advice="reading does without it; capture again to have it")
    elif (plan.key, plan.sites, plan.dtype, plan.n_shards) != (
        manifest["key"],
        manifest["sites"],
        manifest["dtype"],
        len(manifest["shards"]),
    ):
        yield Finding(file=MANIFEST, problem=f"does not match {PLAN}", advice=AGAIN)


def _unfinished(folder: Folder) -> Iterator[Finding]:
    try:
        plan = Plan.read(folder)
    except ArtefactError as error:
        yield Finding(file=PLAN, problem=f"is not valid: {error}", advice=AGAIN)
        return
    if plan is None:
        yield Finding(file=MANIFEST, problem="is missing", advice="this is no activation store")
        return
    names = [shard_name(number) for number in range(plan.n_shards)]
    done = {name: entry for name in names if (entry := read_sidecar(folder, name)) is not None}
    problem = f"is missing: the store is unfinished, {len(done)} of {len(names)} shards are there"
    yield Finding(file=MANIFEST, problem=problem, advice="run the same capture again to go on")
    for entry in done.values():
        yield from _shard(folder, entry, None)


def pickle(file: str) -> Finding:
    return Finding(file=file, problem="may be a pickle, which runs code when loaded", advice="do not load it")


def _pickles_in(folder: Folder, path: str) -> Iterator[Finding]:
    """Files in a folder and below it that may be pickles; a file has none."""
    for name in folder.names():
        inside = f"{path}/{name}"
        if folder.child(name).names():
            if folder.link(name) is None:
                yield from _pickles_in(folder.child(name), inside)
        elif name.lower().endswith(PICKLES):
            yield pickle(inside)


def _strangers(folder: Folder) -> Iterator[Finding]:
    """Files that no store has. Shards beyond the manifest's are strangers too."""
    known = {MANIFEST, PLAN, STATISTICS}
    try:
        raw: Any = json.loads(folder.read(MANIFEST if folder.exists(MANIFEST) else PLAN))
        names = [s["file"] for s in raw["shards"]] if "shards" in raw else map(shard_name, range(raw["n_shards"]))
        known |= {name for shard in names for name in (shard, sidecar_name(shard))}
        told = True
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # reported elsewhere
        told = False
    for name in folder.names():
        if (target := folder.link(name)) is not None:
            problem = f"is a link to {target}, whose bytes may change without a trace here"
            yield Finding(file=name, problem=problem, advice="put the file itself in its place")
            continue
        yield from _pickles_in(folder.child(name), name)
        if name in known or (not told and re.fullmatch(r"shard-\d{5,}\.(safetensors|json)", name)):
            continue
        if name.lower().endswith(PICKLES):
            yield pickle(name)
        elif name.startswith(LOCK) or name.endswith(TEMPORARY):
            advice = "capture again to go on and to tidy up" if not folder.exists(MANIFEST) else "delete it"
            yield Finding(file=name, problem="was left by a capture that was killed, or is running", advice=advice)
        else:
            yield Finding(file=name, problem="does not belong to the store", advice="find out who put it there")
