"""Refusals: exit status 2, one line with the reason and the next step, and nothing is written or changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from interp.cli import main, options

Cli = Callable[..., Any]
TINY = ("--model", "tiny-llama")
SMALL = (*TINY, "--n-sequences", "2", "--length", "16", "--n-draws", "1")
SAE = (*TINY, "--site", "resid_post.1", "--n-sequences", "8", "--n-eval", "2", "--length", "32", "--n-steps", "5",
       "--batch-size", "64")  # fmt: skip
PAIR = (*TINY, "--clean", "ab", "--right", "x", "--wrong", "y", "--min-accuracy", "0", "--kinds", "resid_post")


def snapshot(work: Path) -> dict[str, bytes | None]:
    """Every file and folder of the working folder, and every file of the cache beside it."""
    found = {str(path): path.read_bytes() if path.is_file() else None for path in work.rglob("*")}
    cache = work.parent / "cache"
    return found | {str(path): path.read_bytes() for path in cache.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "line", [("run", "massive", *SMALL), ("run", "patching", *PAIR), ("run", "sae", *SAE), ("demo", *TINY)]
)
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_foreign_folders_are_left_alone(cli: Cli, work: Path, line: tuple[str, ...], kind: str) -> None:
    theirs = work / "theirs" / "thesis.txt"
    theirs.parent.mkdir()
    theirs.write_text("mine", encoding="utf-8")
    out = theirs.parent if kind == "folder" else theirs
    before = snapshot(work)
    said = cli(*line, "--out", out)
    assert "choose another folder" in said.reason and said.err.count("\n") == 1, "refused before the work"
    assert snapshot(work) == before


def bad_folder(work: Path) -> None:
    """What a user might point at by mistake."""
    (work / "empty.txt").touch()
    (work / "picture.txt").write_bytes(b"\xff\xd8\xff\xe0")
    pickled = work / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04")
    (work / "not-a-model").mkdir()
    (work / "model.gguf").write_bytes(b"GGUX")
    (work / "other.json").write_text("{}", encoding="utf-8")


BAD = {
    "no method": (("run",), "the method comes first: interp run METHOD"),
    "method": (("run", "massiv"), "unknown method 'massiv'; nearest: massive"),
    "command": (("rnu",), "unknown command 'rnu'; nearest: run"),
    "sub-command": (("steer", "swep"), "unknown command 'swep'; nearest: sweep"),
    "flag": (("run", "massive", *TINY, "--lenght", "3"), "unknown flag '--lenght'; nearest: --length"),
    "flag of a plain command": (("sites", "tiny-llama", "--jsn"), "unknown flag '--jsn'; nearest: --json"),
    "no model": (("sites",), "Missing argument 'MODEL'"),
    "tiny model": (("sites", "tiny-lama"), "unknown tiny model 'tiny-lama'; nearest: tiny-llama"),
    "model": (("run", "massive", "--model", "smollm2-135"), "unknown model 'smollm2-135'"),
    "site": (("sites", "tiny-llama", "gaet.*"), "unknown site 'gaet.*'; nearest: gate."),
    "layer": (("sites", "tiny-llama", "gate.7"), "layers with gate: 0-2"),
    "layer of sae": (("run", "sae", *TINY, "--site", "resid_post.10"), "layers with resid_post: 0-2"),
    "layer of extract": (("steer", "extract", *TINY, "--layer", "9"), "layers with resid_post: 0-2"),
    "negative layer": (("steer", "extract", *TINY, "--layer", "-1"), "unknown site 'resid_post.-1'"),
    "site without a width": (("run", "sae", *TINY, "--site", "pattern.0"), "pattern.0"),
    "dtype": (("verify", "tiny-llama", "--dtype", "float31"), "unknown dtype 'float31'; nearest: float32"),
    "device": (("verify", "tiny-llama", "--device", "cuda:99"), "device 'cuda:99' is not on this machine"),
    "k": (("run", "sae", *SAE, "--d-dict", "8", "--k", "9"), "k=9 must lie in 1..d_dict=8"),
    "k of 0": (("run", "sae", *SAE, "--d-dict", "8", "--k", "0"), "k=0 must lie in 1..d_dict=8"),
    "unequal pair": (("patch", *PAIR, "--corrupt", "abc"), "2 tokens against 3"),
    "half a pair": (("patch", *TINY, "--clean", "ab"), "needs all of clean, corrupt, right and wrong"),
    "answer of two tokens": (("patch", *PAIR, "--corrupt", "ac", "--right", "xy"), "not one token"),
    "task": (("patch", *TINY, "--task", "iio"), "unknown task 'iio'; nearest: ioi"),
    "kind": (("patch", *PAIR, "--corrupt", "ac", "--kinds", "resid_pots"), "resid_post"),
    "prompts of the demo": (("demo", *TINY), "can be aligned for this tokenizer"),
    "empty corpus": (("run", "massive", *TINY, "--corpus", "file:empty.txt"), "'file:empty.txt' is empty"),
    "no corpus file": (("run", "massive", *TINY, "--corpus", "file:no.txt"), "could not read no.txt"),
    "binary corpus": (("run", "massive", *TINY, "--corpus", "file:picture.txt"), "picture.txt"),
    "topic": (("run", "massive", *TINY, "--corpus", "docs:asignment"), "unknown topic 'asignment'; nearest: assign"),
    "no sequences": (("run", "massive", *TINY, "--n-sequences", "0"), "n_sequences=0"),
    "too long": (("run", "massive", *TINY, "--length", "99999"), "ask for fewer"),
    "method of extract": (("steer", "extract", *TINY, "--method", "men"), "unknown method 'men'; nearest: mean"),
    "out of extract": (("steer", "extract", *TINY, "--out", "v.pt"), "should end in .safetensors"),
    "pickles": (("sites", "pickled"), "only as pickles (pytorch_model.bin)"),
    "pickle": (("sites", "pickled/pytorch_model.bin"), "may hold pickled code"),
    "no model folder": (("sites", "not-a-model"), "it has no config.json"),
    "foreign GGUF": (("sites", "model.gguf"), "model.gguf"),
    "run": (("report", "smal"), "unknown run 'smal'; nearest: runs/small"),
    "no runs": (("list", "nowhere"), "no folder 'nowhere' here"),
    "work": (("bench", "captur"), "unknown work 'captur'; nearest: capture"),
    "rounds": (("bench", "capture", "--rounds", "0"), "--rounds"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(cli: Cli, run_copy: Path, name: str) -> None:
    work = run_copy.parents[1]
    bad_folder(work)
    argv, reason = BAD[name]
    before = snapshot(work)
    said = cli(*argv).reason
    assert reason in said
    assert snapshot(work) == before, "something was written"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE: dict[str, Callable[[Path], None]] = {
    "manifest cut": lambda run: cut(run / "manifest.json"),
    "manifest of others": lambda run: (run / "manifest.json").write_text('{"name": "my-app"}') and None,
    "manifest a list": lambda run: (run / "manifest.json").write_text("[]") and None,
    "manifest binary": lambda run: (run / "manifest.json").write_bytes(b"\xff\xfe") and None,
    "manifest of the future": lambda run: (run / "manifest.json").write_text('{"format": 99}') and None,
    "tensors cut": lambda run: cut(run / "tensors.safetensors"),
    "tensors gone": lambda run: (run / "tensors.safetensors").unlink(),
    "table cut": lambda run: cut(next((run / "tables").iterdir())),
    "table gone": lambda run: next((run / "tables").iterdir()).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("command", ["report", "replay"])
def test_damaged_runs(cli: Cli, run_copy: Path, command: str, damage: str) -> None:
    DAMAGE[damage](run_copy)
    before = snapshot(run_copy)
    assert "small" in cli(command, run_copy).reason
    assert snapshot(run_copy) == before
    assert cli("list", "--json").status == 0


def test_an_interrupt_has_its_own_status(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(options, "open_model", stopped)
    assert main(["run", "massive", *SMALL, "--out", "mine"]) == 130
    assert capsys.readouterr().err == "interp: interrupted\n" and not list(work.iterdir())


def test_an_error_of_ours_keeps_its_traceback(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(options, "open_model", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        main(["sites", "tiny-llama"])
    assert not list(work.iterdir())
