"""Which of several processes this is, and the lock that keeps strangers out of a store in the making.

`torchrun` tells each process its rank and the number of them; rank r of W writes the shards s with s % W == r. Every
job has a rank 0, and each rank holds the lock of its number, so two jobs cannot write one folder. The kernel drops the
lock of a killed process, so nothing stale is left. Locks are per machine and on local folders only: on a network file
system that does not carry `flock`, two jobs on two machines can only waste work, since both write the same bytes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from interp.core.errors import ArtefactError, InterpError

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing is locked there
    fcntl = None

LOCK = ".lock-"
PATIENCE_SECONDS = 1800.0
"""How long a process waits for the others without seeing a new shard."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those that share a job."""

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise InterpError(f"rank {self.rank} of {self.world} processes; ranks run from 0 to {self.world - 1}")

    @classmethod
    def current(cls) -> Ranks:
        """From torch.distributed where it is initialised, else from RANK and WORLD_SIZE, else alone."""
        if dist.is_available() and dist.is_initialized():
            return cls(rank=dist.get_rank(), world=dist.get_world_size())
        rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        if not rank.isdigit() or not world.isdigit():
            raise InterpError(f"RANK={rank!r} and WORLD_SIZE={world!r} must be numbers, as torchrun sets them")
        return cls(rank=int(rank), world=int(world))

    def mine(self, n_shards: int) -> range:
        return range(self.rank, n_shards, self.world)

    def wait(self, done: Callable[[], int], total: int, what: str) -> None:
        """Until `done()` reaches `total`; the others' files are watched, so no collective is needed."""
        seen, since, pause = -1, time.monotonic(), 0.02
        while (now := done()) < total:
            if now != seen:
                seen, since = now, time.monotonic()
            if time.monotonic() - since > PATIENCE_SECONDS:
                raise ArtefactError(
                    f"rank {self.rank} waited {PATIENCE_SECONDS:.0f} s for {what}: {now} of {total} are there; "
                    "another process has died or hangs; run the same capture again to go on"
                )
            time.sleep(pause)
            pause = min(1.0, pause * 1.5)

    def barrier(self) -> None:
        """Where torch.distributed is initialised: until all are here."""
        if self.world > 1 and dist.is_available() and dist.is_initialized():
            try:
                dist.barrier()
            except RuntimeError as error:
                died = "another process of this job has died; run the same capture again to go on"
                raise ArtefactError(f"rank {self.rank} of {self.world}: {died} ({error})") from error


@contextmanager
def joined(backend: str = "gloo", timeout: timedelta = timedelta(hours=24)) -> Generator[Ranks, None, None]:
    """Initialise torch.distributed for the block, where torchrun started several processes and nobody has done it.

    A worker that torchrun restarts may find the addresses of dead ones under the keys of the attempt before, so each
    attempt gets keys of its own.
    """
    if not dist.is_available() or dist.is_initialized() or Ranks.current().world == 1:
        yield Ranks.current()
        return
    found, rank, world = next(rendezvous("env://", timeout=timeout))
    attempt = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), found)
    dist.init_process_group(backend, store=attempt, rank=rank, world_size=world, timeout=timeout)
    try:
        yield Ranks(rank=rank, world=world)
    finally:
        dist.destroy_process_group()


@contextmanager
def locked(folder: Path | None, ranks: Ranks) -> Generator[None, None, None]:
    """Hold the lock of this rank; None is a folder that cannot be locked."""
    if folder is None or fcntl is None:
        yield
        return
    path = folder / f"{LOCK}{ranks.rank}"
    handle = _acquire(path, folder)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is still held
        os.close(handle)


def _acquire(path: Path, folder: Path) -> int:
    assert fcntl is not None
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 20).decode(errors="replace") or "?"
            os.close(handle)
            raise ArtefactError(
                f"{folder} is being written by process {holder}; wait for it, or end it and capture again"
            ) from None
        except OSError:  # a file system without locks
            return handle
        try:
            if os.stat(path).st_ino == os.fstat(handle).st_ino:
                os.ftruncate(handle, 0)
                os.write(handle, str(os.getpid()).encode())
                return handle
        except FileNotFoundError:
            pass
        os.close(handle)  # its last holder removed it between open and lock
