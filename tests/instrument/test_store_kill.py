"""A capture killed at any moment and run again gives the very bytes of one that was left alone."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from interp.core.errors import ArtefactError
from interp.instrument.shards import read_sidecar, shard_name
from interp.instrument.store import ActivationStore, StoreConfig
from interp.instrument.store_audit import audit
from interp.instrument.store_folders import LocalFolder
from interp.instrument.store_ranks import Ranks, locked
from interp.instrument.tokens import from_ids
from interp.models.tiny import tiny_model
from tests.instrument.store_job import N_SHARDS, fork, wait


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Name -> bytes of an uninterrupted capture."""
    folder = tmp_path_factory.mktemp("whole")
    assert wait(fork(folder)) == 0
    found = contents(folder)
    assert sum(name.endswith(".safetensors") for name in found) == N_SHARDS + 1
    return found


def contents(folder: Path) -> dict[str, bytes]:
    (path,) = folder.iterdir()
    return {file.name: file.read_bytes() for file in path.iterdir()}


def n_done(folder: Path) -> int:
    (path,) = folder.iterdir()
    return sum(read_sidecar(LocalFolder(path), shard_name(i)) is not None for i in range(N_SHARDS))


@pytest.mark.parametrize(
    "points",
    [
        ["plan"],
        ["shard half written"],
        ["shard written:4"],
        ["shard named"],
        ["sidecar:2"],
        ["statistics"],
        ["manifest"],
        ["complete"],
        ["shard half written:3", "sidecar", "shard named:2", "manifest", "complete"],
    ],
    ids="+".join,
)
def test_killed_at_a_chosen_point(whole, tmp_path, points):
    for point in points:
        assert wait(fork(tmp_path, die_at=point)) == -signal.SIGKILL
    assert wait(fork(tmp_path)) == 0
    assert contents(tmp_path) == whole
    assert audit(next(tmp_path.iterdir())) == []


def test_at_most_the_shards_in_hand_are_lost(whole, tmp_path):
    """One shard waits for the disk while the next is written."""
    lost = []
    for after in (1, 3, 5):
        before = n_done(tmp_path) if list(tmp_path.iterdir()) else 0
        wait(fork(tmp_path, die_at=f"shard written:{after}"))
        lost.append(before + after - n_done(tmp_path))
    assert max(lost) <= 2
    assert wait(fork(tmp_path)) == 0 and contents(tmp_path) == whole


@pytest.mark.parametrize("seed", range(4))
def test_killed_again_and_again_at_random_moments(whole, tmp_path, seed):
    rng, codes = random.Random(seed), list[int]()
    while not codes or codes[-1] != 0:
        process = fork(tmp_path, slow=0.01)
        time.sleep(rng.uniform(0.0, 0.05 * (3 + len(codes))))  # longer and longer, so that it ends
        os.kill(process, signal.SIGKILL)  # of a process that has ended already, nothing
        codes.append(wait(process))
        assert codes[-1] in (0, -signal.SIGKILL), tmp_path.with_suffix(".txt").read_text()
    assert len(codes) > 3 and contents(tmp_path) == whole


def test_a_torn_shard_is_not_trusted(whole, tmp_path):
    """As after a power cut: the sidecar is there, the shard is short; or the sidecar is empty."""
    wait(fork(tmp_path, die_at="manifest"))
    (path,) = tmp_path.iterdir()
    os.truncate(path / shard_name(2), 100)
    (path / "shard-00005.json").write_text("")
    assert n_done(tmp_path) == N_SHARDS - 2
    assert wait(fork(tmp_path)) == 0 and contents(tmp_path) == whole


def test_a_second_capture_of_the_same_store_is_refused_and_the_first_goes_on(whole, tmp_path):
    first = fork(tmp_path, slow=0.1)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*/shard-*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert wait(fork(tmp_path)) == 1
    assert f"is being written by process {first}" in tmp_path.with_suffix(".txt").read_text()
    assert wait(first) == 0 and contents(tmp_path) == whole


def test_the_lock_is_per_rank_and_goes_with_its_holder(tmp_path):
    with locked(tmp_path, Ranks()):
        with locked(tmp_path, Ranks(rank=1, world=2)):
            assert sorted(p.name for p in tmp_path.iterdir()) == [".lock-0", ".lock-1"]
        caught: list[BaseException] = []

        def other() -> None:
            try:
                with locked(tmp_path, Ranks()):
                    pass
            except ArtefactError as error:
                caught.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert len(caught) == 1
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path, Ranks()):
        pass


def test_going_on_with_another_cut_or_another_torch_is_refused(tmp_path, monkeypatch):
    """Values would differ in their last bits; shards of another size hold the same values, so the plan's is kept."""
    model = tiny_model("llama")
    record = from_ids(model, torch.randint(3, 259, (6, 5), generator=torch.Generator().manual_seed(0)))
    config = StoreConfig(dtype="float32", rows_per_forward=2, shard_tokens=10)
    stop = [3]  # the first batch is run for the plan, the third one stops

    def interrupt(*_) -> None:
        stop[0] -= 1
        if stop[0] == 0:
            raise KeyboardInterrupt

    with model.module.register_forward_pre_hook(interrupt), pytest.raises(KeyboardInterrupt):
        ActivationStore.write(model, record, "z.0", tmp_path, config)
    (folder,) = tmp_path.iterdir()
    with pytest.raises(ArtefactError, match="unfinished: 2 of 3 shards"):
        ActivationStore.open(folder)
    with pytest.raises(ArtefactError, match="begun with 2 rows per forward; this is 3 rows per forward"):
        ActivationStore.write(model, record, "z.0", tmp_path, StoreConfig(dtype="float32", rows_per_forward=3))
    with monkeypatch.context() as patch:
        patch.setattr("interp.instrument.store_plan.versions", lambda: {"torch": "1.0"})
        with pytest.raises(ArtefactError, match=r"begun with torch .* this is torch 1\.0"):
            ActivationStore.write(model, record, "z.0", tmp_path, config)
    larger = StoreConfig(dtype="float32", rows_per_forward=2, shard_tokens=1000)
    assert ActivationStore.write(model, record, "z.0", tmp_path, larger).sizes == [10, 10, 10]
