"""Several processes write one store, under torchrun too, and the bytes are those of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from interp.core.errors import ArtefactError, InterpError
from interp.instrument import store_ranks
from interp.instrument.store import ActivationStore
from interp.instrument.store_ranks import Ranks
from interp.instrument.tokens import from_ids
from tests.instrument.store_job import CONFIG, N_SHARDS, SITES, capture_store, fork, job_model, wait

JOB = Path(__file__).with_name("store_job.py")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    assert wait(fork(folder)) == 0
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    (path,) = folder.iterdir()
    return {file.name: file.read_bytes() for file in path.iterdir()}


def fork_ranks(folder: Path, world: int, monkeypatch: pytest.MonkeyPatch, **options: str) -> list[int]:
    """Exit statuses of `world` processes; rank 1 takes the options."""
    processes: list[int] = []
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        processes.append(fork(folder, **(options if rank == 1 else {})))
    return list(map(wait, processes))


@pytest.mark.parametrize("world", [2, 3, N_SHARDS + 1])
def test_any_number_of_processes_gives_the_same_bytes(whole, tmp_path, monkeypatch, world):
    assert fork_ranks(tmp_path, world, monkeypatch) == [0] * world
    assert contents(tmp_path) == whole


def test_a_store_begun_by_three_may_be_finished_by_one(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(store_ranks, "PATIENCE_SECONDS", 0.5)
    codes = fork_ranks(tmp_path, 3, monkeypatch, die_at="shard named:2")
    assert codes[0] == 1 and codes[1] < 0
    assert "are there; another process has died" in tmp_path.with_suffix(".txt").read_text()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert wait(fork(tmp_path)) == 0 and contents(tmp_path) == whole


def torchrun(folder: Path, *options: str, job: tuple[str, ...] = (), restarts: int = 0) -> tuple[int, str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", str(restarts),
        "--monitor-interval", "0.1", *options, str(JOB), str(folder), *job,
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(JOB.parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["none", "gloo"])
def test_under_torchrun_a_killed_worker_restarts_and_goes_on(whole, tmp_path, backend):
    """With torch.distributed initialised (gloo) and without, where ranks come from the environment."""
    job = ("--backend", backend, "--die-at", "shard named:2", "--once", str(tmp_path / "died"), "--rank", "1")
    code, text = torchrun(tmp_path / "a", "--standalone", job=job, restarts=1)
    assert code == 0, text
    assert (tmp_path / "died").exists() and "exitcode: -9" in text
    assert contents(tmp_path / "a") == whole


@pytest.mark.slow
def test_across_two_hosts(whole, tmp_path, two_hosts):
    """Two network namespaces that see each other over one cable and share the disk."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
        "--master-addr", "10.77.0.1", "--master-port", "29611", str(JOB), str(tmp_path / "a"), "--backend", "gloo",
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(JOB.parents[2])}
    running = [
        subprocess.Popen(
            ["ip", "netns", "exec", host, *command[:3], "--node-rank", str(rank), *command[3:]],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**env, "GLOO_SOCKET_IFNAME": f"cable{rank}"},
        )
        for rank, host in enumerate(two_hosts)
    ]  # fmt: skip
    texts = [process.communicate(timeout=200)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], texts
    assert contents(tmp_path / "a") == whole


@pytest.fixture
def two_hosts():
    """Names of two namespaces, 10.77.0.1 and 10.77.0.2."""
    hosts = [f"interp-{os.getpid()}-{i}" for i in range(2)]
    steps = [["netns", "add", host] for host in hosts]
    steps += [["link", "add", "cable0", "netns", hosts[0], "type", "veth", "peer", "name", "cable1", "netns", hosts[1]]]
    for rank, host in enumerate(hosts):
        steps += [["-n", host, "addr", "add", f"10.77.0.{rank + 1}/24", "dev", f"cable{rank}"]]
        steps += [["-n", host, "link", "set", device, "up"] for device in ("lo", f"cable{rank}")]
    try:
        for step in steps:
            try:
                done = subprocess.run(["ip", *step], capture_output=True, text=True)
            except FileNotFoundError:
                pytest.skip("no ip command to make network namespaces with")
            if done.returncode:
                pytest.skip(f"network namespaces are not allowed here: ip {' '.join(step)}: {done.stderr.strip()}")
        yield hosts
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host], capture_output=True)


def test_rank_and_world_come_from_the_environment(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert Ranks.current() == Ranks(rank=0, world=1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert Ranks.current() == Ranks(rank=2, world=4)
    assert sorted(s for rank in range(4) for s in Ranks(rank=rank, world=4).mine(10)) == list(range(10))
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(InterpError, match="WORLD_SIZE='two' must be numbers"):
        Ranks.current()
    with pytest.raises(InterpError, match="rank 3 of 3"):
        Ranks(rank=3, world=3)


def test_ranks_may_be_given_by_hand(whole, tmp_path, monkeypatch):
    """One after the other, as jobs of a cluster without torchrun; the last to come is rank 0."""
    monkeypatch.setattr(store_ranks, "PATIENCE_SECONDS", 0.2)
    model = job_model()
    ids = torch.randint(3, 259, (26, 15), generator=torch.Generator().manual_seed(0))
    for rank in (2, 1):
        with pytest.raises(ArtefactError, match="waited 0 s for the manifest"):
            ActivationStore.write(model, from_ids(model, ids), SITES, tmp_path, CONFIG, ranks=Ranks(rank=rank, world=3))
    ActivationStore.write(model, from_ids(model, ids), SITES, tmp_path, CONFIG, ranks=Ranks(rank=0, world=3))
    assert contents(tmp_path) == whole
    assert capture_store(tmp_path)
