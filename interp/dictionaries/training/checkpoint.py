"""Checkpoints: everything the next step depends on, on disk, whole or not at all.

    checkpoints/step-000001000/checkpoint.json                    step, position in the data, counters, checksums
    checkpoints/step-000001000/shard-*.safetensors                weights, moments, tokens since each latent fired

Tensors go through torch.distributed.checkpoint, so that several processes write their shards at once and a run may go
on with another number of processes. Of its storages this takes the safetensors one (HuggingFaceStorageWriter): the
usual one writes `.metadata`, a pickle, and nothing here is ever unpickled. What is not a tensor is JSON. There is no
state of random numbers to keep: every draw is made from the seed and the number of its step or epoch.
A checkpoint is written under a temporary name, synced, then renamed; the last `keep` stay, older ones go afterwards.
Reading verifies every checksum; a damaged checkpoint is passed over, with a warning, for the one before.
Encoders are stored with latents as rows, as they lie in memory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from interp.core.errors import ArtefactError
from interp.core.hash import hash_file, hash_json
from interp.dictionaries.training.parallel import Team

DESCRIPTION, VERSION = "checkpoint.json", 1


class CheckpointWarning(UserWarning):
    """A checkpoint could not be used."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose checksums are right."""

    path: Path
    step: int
    """Steps done."""
    facts: Mapping[str, Any]
    """What is not a tensor."""
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    """Shape (of all processes together) and type of each tensor."""


def folder_of(parent: Path, step: int) -> Path:
    return parent / f"step-{step:09d}"


def write(parent: Path, step: int, tensors: Mapping[str, Any], facts: Mapping[str, Any], team: Team, keep: int) -> Path:
    """Write a checkpoint; every process of the team calls this."""
    folder, draft = folder_of(parent, step), parent / f".step-{step:09d}.draft"
    speaks = team.ranks.rank == 0
    try:
        if speaks:
            parent.mkdir(parents=True, exist_ok=True)
            _sweep(parent)
            draft.mkdir()
        team.barrier()
        _save(dict(tensors), draft, team)
        team.barrier()
        if speaks:
            _describe(draft, step, tensors, facts)
            if folder.exists():
                shutil.rmtree(folder)
            draft.rename(folder)
            _sync(parent)
            _prune(parent, keep)
        team.barrier()
    except (OSError, SafetensorError, CheckpointException) as error:
        raise ArtefactError(f"could not write the checkpoint {folder}: {error}; free space") from error
    return folder


def _save(tensors: dict[str, Any], draft: Path, team: Team) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one process is one process
        writer = HuggingFaceStorageWriter(str(draft), save_distributed=True)
        save_shards(tensors, storage_writer=writer, no_dist=team.ranks.world == 1)


def _describe(draft: Path, step: int, tensors: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    files = {p.name: {"bytes": p.stat().st_size, "hash": hash_file(p)} for p in sorted(draft.iterdir())}
    described = {
        "version": VERSION,
        "step": step,
        "facts": dict(facts),
        "tensors": {name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in tensors.items()},
        "files": files,
    }
    path = draft / DESCRIPTION
    path.write_text(json.dumps({**described, "checksum": hash_json(described)}, indent=1), encoding="utf-8")
    for part in (*draft.iterdir(), draft):
        _sync(part)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def steps_in(parent: Path) -> list[int]:
    """Steps of the checkpoints in a folder, the newest first; what a kill left half written has no such name."""
    names = [re.fullmatch(r"step-(\d{9})", path.name) for path in parent.iterdir()] if parent.is_dir() else []
    return sorted((int(name[1]) for name in names if name), reverse=True)


def _prune(parent: Path, keep: int) -> None:
    for step in steps_in(parent)[keep:]:
        gone = parent / f".step-{step:09d}.gone"
        folder_of(parent, step).rename(gone)  # a kill in the middle of deleting leaves no half checkpoint
        shutil.rmtree(gone)


def _sweep(parent: Path) -> None:
    """Remove what killed processes left."""
    for path in parent.glob(".step-*"):
        shutil.rmtree(path)


def check(folder: Path) -> Checkpoint:
    """A checkpoint, every byte of it verified. Raises ArtefactError with what is wrong."""
    try:
        described: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        checksum = described.pop("checksum")
        if described["version"] != VERSION:
            raise ArtefactError(f"{folder} has version {described['version']}; this interp reads version {VERSION}")
        if checksum != hash_json(described):
            raise ArtefactError(f"{folder / DESCRIPTION} is damaged: its checksum is wrong")
        for name, told in described["files"].items():
            path = folder / name
            if path.stat().st_size != told["bytes"] or hash_file(path) != told["hash"]:
                raise ArtefactError(f"{path} is damaged: its checksum is wrong")
        tensors = {
            name: (tuple(shape), cast("torch.dtype", getattr(torch, dtype)))
            for name, (shape, dtype) in described["tensors"].items()
        }
        return Checkpoint(path=folder, step=described["step"], facts=described["facts"], tensors=tensors)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ArtefactError):
            raise
        raise ArtefactError(f"{folder} is damaged: {type(error).__name__}: {error}") from error


def latest(parent: Path, team: Team) -> Checkpoint | None:
    """The newest checkpoint that is whole, the same for every process; None where there is none."""
    chosen = -1
    for step in steps_in(parent) if team.ranks.rank == 0 else ():
        try:
            chosen = check(folder_of(parent, step)).step
            break
        except ArtefactError as error:
            warnings.warn(f"{error}; going back to the checkpoint before", CheckpointWarning, stacklevel=2)
    chosen = team.first(chosen)
    return None if chosen < 0 else check(folder_of(parent, chosen))


def read(found: Checkpoint, team: Team, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """This process' tensors, by the names they were written under."""
    own: dict[str, Tensor] = {}
    shared: dict[str, Any] = {}
    for name, (shape, dtype) in found.tensors.items():
        own[name] = torch.zeros(team.local_shape(name, shape), dtype=dtype, device=device)
        shared[name] = team.stored(name, own[name])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader = HuggingFaceStorageReader(str(found.path))
            load_shards(shared, storage_reader=reader, no_dist=team.ranks.world == 1)
    except (OSError, SafetensorError, CheckpointException) as error:
        raise ArtefactError(f"{found.path} cannot be read: {error}") from error
    return own
