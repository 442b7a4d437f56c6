"""A run killed at any moment and run again gives the very bits of one that was left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from interp.dictionaries.training.journal import TIMES, rows
from tests.dictionaries.training.train_job import JOBS, SAFE, fork, run_job, wait

STEPS = (20, 24)
"""Checkpoints that stay."""


def contents(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, object]], dict[str, object]]:
    """Every tensor below a finished run, its log without times, and what its checkpoints say beside checksums."""
    tensors = {
        f"{path.relative_to(folder)}/{name}": value
        for path in sorted(folder.rglob("*.safetensors"))
        for name, value in load_file(path).items()
    }
    log = [{key: value for key, value in row.items() if key not in TIMES} for row in rows(folder / "log.jsonl")]
    told = {}
    for path in folder.glob("checkpoints/step-*/checkpoint.json"):
        read = json.loads(path.read_text())
        told[path.parent.name] = {key: read[key] for key in ("step", "facts", "tensors")}
    return tensors, log, told


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory):
    run_job(tmp_path_factory.mktemp("warm") / "run")  # what is imported when first used, forked processes then have
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert wait(fork(folder)) == 0, folder.with_suffix(".txt").read_text()
    found = contents(folder)
    assert sorted(found[2]) == [f"step-{step:09d}" for step in STEPS]
    assert len(found[1]) == 7 + 3 + 4  # auto every 4 steps and the last; the others every 10 and their last
    assert {name.split("/")[1] for name in found[0] if name.startswith("dictionaries")} == {j.name for j in JOBS}
    return found


def same(folder: Path, whole) -> None:
    tensors, log, told = contents(folder)
    assert log == whole[1] and told == whole[2] and list(tensors) == list(whole[0])
    for name, value in whole[0].items():
        assert torch.equal(tensors[name], value), name
    assert not [path.name for path in (folder / "checkpoints").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "points",
    [
        ["step"],
        ["step:31"],
        ["checkpoint begun"],
        ["tensors written:2"],
        ["checkpoint described:3"],
        ["checkpoint named:2"],
        ["deleting old"],
        ["deleting old:2"],
        ["tensors written", "step:2", "checkpoint named", "step:14", "checkpoint described", "step:8", "deleting old"],
    ],
    ids="+".join,
)
def test_killed_at_a_chosen_point(whole, tmp_path, points):
    folder = tmp_path / "run"
    for point in points:
        assert wait(fork(folder, die_at=point)) == -signal.SIGKILL
    assert wait(fork(folder)) == 0, folder.with_suffix(".txt").read_text()
    same(folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again_at_random_moments(whole, tmp_path, seed):
    rng, codes, folder = random.Random(seed), list[int](), tmp_path / "run"
    while not codes or codes[-1] != 0:
        process = fork(folder, slow=0.01)
        time.sleep(rng.uniform(0.0, 0.06 * (4 + len(codes))))  # longer and longer, so that it ends
        os.kill(process, signal.SIGKILL)  # of a process that has ended already, nothing
        codes.append(wait(process))
        assert codes[-1] in (0, -signal.SIGKILL), folder.with_suffix(".txt").read_text()
    assert len(codes) > 3
    same(folder, whole)


def test_a_finished_run_may_be_resumed_and_nothing_moves(whole, tmp_path):
    folder = tmp_path / "run"
    for _ in range(2):
        assert wait(fork(folder)) == 0
    same(folder, whole)


def test_ctrl_c_lets_the_step_end_and_leaves_a_checkpoint(whole, tmp_path):
    folder, rarely = tmp_path / "run", replace(SAFE, save_every=1000)
    process = fork(folder, slow=0.1, safe=rarely)
    deadline = time.monotonic() + 60
    while len(rows(folder / "log.jsonl")) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process, signal.SIGINT)
    assert wait(process) == 1
    said = folder.with_suffix(".txt").read_text()
    assert said.startswith("KeyboardInterrupt: stopped after step")
    step = int(said.split("after step ")[1].split(";")[0])
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step-{step:09d}"] and 5 <= step < 24
    assert wait(fork(folder)) == 0
    same(folder, whole)
