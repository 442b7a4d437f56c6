"""`interp capture`, `interp plan capture`, `interp audit` on a tiny model, alone and under torchrun."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

from interp.cli.capture import _agreed
from interp.cli.capture_job import split_sites
from interp.core.errors import InterpError
from interp.instrument.store import ActivationStore
from interp.tasks.corpora import KINDS
from interp.tasks.corpora_inputs import INPUT_KINDS
from tests.cli.conftest import Cli

TINY = ("--model", "tiny-llama", "--corpus", "docs:assignment", "--length", "64", "--pack")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a command asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)  # gloo's own sockets are not Python's


def test_names_are_split_at_commas_outside_braces() -> None:
    assert split_sites("resid_post.*, gate.{0,1},z.2") == ["resid_post.*", "gate.{0,1}", "z.2"]


def test_a_capture_is_planned_written_found_again_and_audited(cli: Cli, work: Path) -> None:
    flags = (*TINY, "--sites", "resid_post.1,gate.{0,2}", "--tokens", "640", "--json")
    plan = cli("plan", "capture", *flags)
    assert plan.status == 0 and plan.json["fits"] and plan.json["n_tokens"] == 640
    first = cli("capture", *flags)
    assert first.status == 0 and first.json["tokens"] == 640
    folder = work / first.json["store"]
    assert abs(plan.json["disk_bytes"] - sum(p.stat().st_size for p in folder.iterdir())) < 0.1 * first.json["bytes"]
    stamp = (folder / "manifest.json").stat().st_mtime_ns
    assert cli("capture", *flags).json == first.json
    assert (folder / "manifest.json").stat().st_mtime_ns == stamp
    store = ActivationStore.open(folder)
    assert set(store.sites) == {"resid_post.1", "gate.0", "gate.2"}
    assert cli("audit", folder).status == 0
    shard = folder / "shard-00000.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    (folder / "extra.pkl").write_bytes(b"\x80\x04.")
    found = cli("audit", "runs/stores", "--json")
    (problems,) = found.json.values()
    assert found.status == 1
    assert {p["file"] for p in problems} == {"shard-00000.safetensors", "extra.pkl"}


def test_padding_and_its_share_are_said(cli: Cli) -> None:
    flags = ("--model", "tiny-llama", "--corpus", "docstrings:einops", "--length", "200", "--sites", "z.1")
    said = cli("capture", *flags, "--pad", "--store-dtype", "int8")
    assert said.status == 0 and "padding" in said.out and "z.1" in said.out and "4 8" in said.out
    assert 0 < cli("plan", "capture", *flags, "--pad", "--json").json["padding"] < 0.1


def test_only_as_many_documents_are_read_as_are_needed(cli: Cli, work: Path) -> None:
    lines = [json.dumps({"text": "ab" * n}) for n in range(1, 40)]
    (work / "a.jsonl").write_text("\n".join([*lines, "broken"]))
    flags = ("--model", "tiny-llama", "--sites", "z.1", "--corpus", "jsonl:a.jsonl", "--length", "20", "--json")
    for packing in ("--pack", "--pad"):
        assert cli("capture", *flags, packing, "--tokens", "100").json["tokens"] in range(100, 120)
        assert "line 40" in cli("capture", *flags, packing).reason
    (work / "b.jsonl").write_text("\n".join(lines))
    found = cli("capture", *flags[:5], "jsonl:b.jsonl", *flags[6:], "--pack", "--tokens", "100")
    assert found.json["store"] == cli("capture", *flags, "--pack", "--tokens", "100").json["store"]


@pytest.mark.needs_package("PIL")
def test_images_and_arrays_through_a_vision_model(cli: Cli, work: Path) -> None:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (11, 20, 24, 3), dtype=np.uint8)
    (work / "pictures").mkdir()
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(work / "pictures" / f"{number:02d}.png")
    flags = ("--model", "tiny-vit", "--sites", "resid_post.*", "--rows-per-forward", "4", "--json")
    images = ("--corpus", "images:pictures?size=16")
    plan, said = cli("plan", "capture", *flags, *images), cli("capture", *flags, *images)
    folder = work / said.json["store"]
    assert plan.json["fits"] and cli("audit", folder).status == 0
    store = ActivationStore.open(folder)
    n_pos = len(store) // 11
    assert len(store) == 11 * n_pos and n_pos > 1
    assert store.tokens()[1].tolist() == [row for row in range(11) for _ in range(n_pos)]
    np.save("a.npy", np.moveaxis(pixels[:, :16, :16], 3, 1).astype(np.float32) / 255)
    assert cli("capture", *flags, "--corpus", "array:a.npy").json["tokens"] == len(store)
    refused = cli("plan", "capture", *flags, "--corpus", "images:pictures?size=32").reason
    assert "tiny-vit does not take an input of shape (4, 3, 32, 32)" in refused


def test_pickles_anywhere_below_are_found(cli: Cli, work: Path) -> None:
    (work / "runs" / "deep").mkdir(parents=True)
    (work / "runs" / "deep" / "weights.pt").write_bytes(b"\x80\x04.")
    store = cli("capture", *TINY, "--tokens", "128", "--sites", "z.1", "--out", "runs", "--json").json["store"]
    (work / store / "more").mkdir()
    (work / store / "more" / "a.pkl").write_bytes(b"\x80\x04.")
    said = cli("audit", "runs", "--json")
    assert said.status == 1
    assert {finding["file"] for finding in said.json["runs"]} == {"deep/weights.pt"}
    assert {finding["file"] for finding in said.json[store]} == {"more", "more/a.pkl"}
    assert "more/a.pkl" in cli("audit", store).out


def test_whole_sequences_are_said(cli: Cli) -> None:
    flags = (*TINY, "--sites", "z.1", "--tokens", "100")
    said = cli("plan", "capture", *flags).out
    assert "128" in said and "100 were asked for, sequences are kept whole" in " ".join(said.split())
    assert "asked for" not in cli("plan", "capture", *flags[:-1], "128").out
    assert cli("capture", *flags, "--json").json["tokens"] == 128


@pytest.mark.parametrize("corpus", ["docs", "sampled"])
def test_text_for_a_model_of_images_is_refused_with_a_corpus_that_works(cli: Cli, work: Path, corpus: str) -> None:
    flags = ("plan", "capture", "--model", "tiny-vit", "--sites", "resid_post.1", "--pack", "--json", "--tokens", "4")
    reason = cli(*flags, "--corpus", corpus).reason
    assert f"--corpus {corpus} is text" in reason and "--corpus array:PATH.npy" in reason and "load(" not in reason
    np.save("a.npy", np.zeros((4, 3, 16, 16), dtype=np.float32))
    assert cli(*flags, "--corpus", "array:a.npy").json["fits"]


def test_arrays_and_samples(cli: Cli, work: Path) -> None:
    said = cli("capture", "--model", "tiny-llama", "--sites", "z.1", "--corpus", "sampled?seed=2", "--tokens", "40",
               "--length", "20", "--json")  # fmt: skip
    assert said.json["tokens"] == 40
    assert "say how much with --tokens" in cli("capture", *TINY[:2], "--sites", "z.1", "--corpus", "sampled").reason


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--sites", "resid_pots.1"), "nearest: resid_post.1"),
        (("--sites", "z.1", "--pad", "--separator", "1"), "--separator stands between packed documents"),
        (("--sites", "z.1", "--corpus", "jsonl:a_fil"), "No such file or directory; nearest: a_file"),
        (("--sites", "z.1", "--store-dtype", "int4"), "unknown store dtype 'int4'; nearest: int8"),
        (("--sites", "z.1", "--length", "9999"), "context"),
        (("--sites", ""), "no sites were asked for"),
        (("--sites", "z.1", "--separator", "100000"), "separator 100000 is no token"),
        (("--sites", "pattern.1"), "pattern.1"),
        (("--sites", "z.1", "--out", "a_file"), "a_file"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(cli: Cli, work: Path, flags: tuple[str, ...], says: str) -> None:
    (work / "a_file").write_text("here")
    assert says in cli("capture", *TINY, "--tokens", "128", *flags).reason
    assert [path.name for path in work.iterdir()] == ["a_file"]


@pytest.mark.parametrize("words", [("capture",), ("plan", "capture")])
def test_the_help_names_every_corpus_whole(cli: Cli, words: tuple[str, ...]) -> None:
    said = cli(*words, "--help").out
    for kind in (*KINDS, *INPUT_KINDS, "sampled?seed=0"):
        assert kind in said


def test_packing_or_padding_is_chosen(cli: Cli, work: Path) -> None:
    assert "say --pack to join them, or --pad" in cli("capture", *TINY[:-1], "--sites", "z.1").reason
    assert not list(work.iterdir())


def test_a_job_that_will_not_fit_is_refused_unless_forced(
    cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from interp.instrument import plan

    monkeypatch.setattr(plan, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    flags = (*TINY, "--tokens", "640", "--sites", "z.1")
    assert "--tokens" in cli("capture", *flags).reason and not list(work.iterdir())
    said = cli("plan", "capture", *flags)
    assert said.status == 1 and "will not fit" in said.out
    assert cli("capture", *flags, "--force").status == 0


def test_auditing_nothing_says_so(cli: Cli) -> None:
    said = cli("audit", "nowhere")
    assert said.status == 1 and "missing" in said.out


def test_where_the_first_process_refuses_all_end(tmp_path: Path) -> None:
    """Two forked processes: the first has a reason, the second ends with the same status and without a word."""
    import torch.distributed as dist

    def refuse() -> None:
        raise InterpError("no room")

    children: list[int] = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            code = 99
            try:
                dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=rank, world_size=2)
                _agreed(rank, lambda: None)
                _agreed(rank, refuse)
            except InterpError:
                code = 10 + rank
            except typer.Exit as stop:
                code = 20 + rank + stop.exit_code
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [10, 23]


def _torchrun(folder: Path, n: int) -> dict[str, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), "-m", "interp.cli",
        "capture", *TINY, "--tokens", "1280", "--sites", "resid_post.1", "--out", str(folder), "--json",
        "--shard-bytes", "40000",
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return {path.name: path.read_bytes() for path in next(folder.iterdir()).iterdir() if path.is_file()}


@pytest.mark.slow
def test_two_processes_write_the_same_bytes_as_one(tmp_path: Path) -> None:
    one, two = _torchrun(tmp_path / "one", 1), _torchrun(tmp_path / "two", 2)
    assert sum(name.endswith(".safetensors") for name in one) == 4
    assert one == two
    first, second = (ActivationStore.open(next((tmp_path / name).iterdir())) for name in ("one", "two"))
    assert torch.equal(next(first.blocks("resid_post.1")), next(second.blocks("resid_post.1")))


@pytest.mark.slow
def test_fallbacks_of_transformers_are_not_told_when_a_tiny_model_is_opened() -> None:
    """In a process of its own, since transformers says such a thing once."""
    command = [sys.executable, "-m", "interp.cli", "sites", "tiny-qwen3-next", "gate.0"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [line for line in done.stderr.splitlines() if not line.startswith("opening")] == []
