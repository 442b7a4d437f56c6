"""A capture that gets killed, for the tests of the store: in a forked process, or as a program under torchrun.

    python store_job.py FOLDER [--die-at POINT[:N]] [--once FILE] [--rank R]

`die_at` sends this process SIGKILL at the N-th arrival at a point of the writer.
"""

from __future__ import annotations

import argparse
import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from interp.instrument.store import ActivationStore, StoreConfig
from interp.instrument.store_folders import Draft, LocalFolder
from interp.instrument.store_ranks import joined
from interp.instrument.tokens import from_ids
from interp.models.model import LoadedModel
from interp.models.tiny import tiny_model

SITES = ["resid_post.1", "neurons.0"]
CONFIG = StoreConfig(dtype="float16", rows_per_forward=2, shard_tokens=30)
N_SHARDS = 13


@functools.cache
def job_model() -> LoadedModel:
    return tiny_model("llama")


def capture_store(folder: Path, *, die_at: str | None = None, slow: float = 0.0) -> str:
    """The key of the finished store. slow: seconds to sleep before each forward."""
    if die_at:
        point, _, after = die_at.partition(":")
        kill_at(point, int(after or 1))
    model = job_model()
    ids = torch.randint(3, 259, (26, 15), generator=torch.Generator().manual_seed(0))
    model.module.register_forward_pre_hook(lambda *_: time.sleep(slow))
    return ActivationStore.write(model, from_ids(model, ids), SITES, folder, CONFIG).key


def fork(folder: Path, **options: Any) -> int:
    """`capture_store` in a process of its own, its id; an error goes into `folder`.txt."""
    job_model()  # built once, here
    process = os.fork()
    if process:
        return process
    code = 0
    try:
        capture_store(folder, **options)
    except BaseException as error:  # noqa: BLE001 - the parent reads it
        folder.with_suffix(".txt").write_text(f"{type(error).__name__}: {error}")
        code = 1
    os._exit(code)


def wait(process: int) -> int:
    """Its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill_at(point: str, after: int) -> None:
    """Make the writer end this process at a point, the way a kill -9 does."""
    begin, arrivals = LocalFolder.begin, [0]

    def here(name: str) -> None:
        if name == point:
            arrivals[0] += 1
            if arrivals[0] == after:
                os.kill(os.getpid(), signal.SIGKILL)

    def patched(self: LocalFolder, name: str, blocks: Any) -> Draft:
        kind = {"plan.json": "plan", "statistics.safetensors": "statistics", "manifest.json": "manifest"}.get(
            name, "shard" if name.endswith(".safetensors") else "sidecar"
        )
        if kind != "shard":
            here(kind)
        elif point == "shard half written":
            begin(self, name, list(blocks)[: len(blocks) // 2])
            here(point)
        draft = begin(self, name, blocks)
        if kind == "shard":
            here("shard written")

        def commit(do: Callable[[], None] = draft.commit) -> None:
            do()
            if kind == "shard":
                here("shard named")
            if kind == "manifest":
                here("complete")

        return Draft(commit=commit, discard=draft.discard)

    LocalFolder.begin = patched


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--die-at")
    parser.add_argument("--once", type=Path, help="die only if this file is not there, and make it")
    parser.add_argument("--rank", help="die only in this process of several")
    parser.add_argument("--backend", default="none", help="of torch.distributed, where it is to be initialised")
    args = parser.parse_args()
    die_at = args.die_at if args.rank in (None, os.environ.get("RANK")) else None
    if die_at and args.once:
        die_at = None if args.once.exists() else die_at
        args.once.touch()
    torch.set_num_threads(1)
    with joined(args.backend) if args.backend != "none" else nullcontext():
        capture_store(args.folder, die_at=die_at)


if __name__ == "__main__":
    main()
