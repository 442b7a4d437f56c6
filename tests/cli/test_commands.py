"""Commands: what they answer, what they write, and that --json is one document on stdout."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from safetensors import safe_open

from interp.cli import console
from interp.cli.app import app
from interp.cli.demo import run_demo
from interp.core.run import load_run
from interp.models import probe

Cli = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("audit", "bench", "capture", "circuit", "demo", "doctor", "list", "models", "patch", "plan", "replay",
            "report", "run", "sae", "sites", "steer", "tasks", "verify")  # fmt: skip
TINY = ("--model", "tiny-llama")
SMALL = (*TINY, "--n-sequences", "2", "--length", "16", "--n-draws", "1")
SAE = (*TINY, "--site", "resid_post.1", "--n-sequences", "8", "--n-eval", "2", "--length", "32", "--n-steps", "5",
       "--batch-size", "64")  # fmt: skip
SWEEP = (*TINY, "--depths", "0.4", "--strengths", "-0.1,0.1", "--n-pairs", "4", "--n-prompts", "4", "--n-random", "2",
         "--n-neutral", "1", "--length", "16")  # fmt: skip
PAIR = (*TINY, "--clean", "ab", "--right", "x", "--wrong", "y", "--min-accuracy", "0", "--kinds", "resid_post")


def test_help_lists_every_command() -> None:
    said = subprocess.run(
        [sys.executable, "-m", "interp.cli", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert said.stderr == "" and "Examples" in said.stdout and "Exit status" in said.stdout
    listed = {line.strip("│ ").split()[0] for line in said.stdout.splitlines() if line.startswith("│ ")}
    assert set(COMMANDS) <= listed


def test_the_list_of_commands_is_whole() -> None:
    group: Any = typer.main.get_command(app)
    assert tuple(sorted(group.commands)) == COMMANDS


@pytest.mark.parametrize("words", [(name,) for name in COMMANDS] + [("sae", "train"), ("steer", "extract")])
def test_help_of_each(cli: Cli, words: tuple[str, ...]) -> None:
    said = cli(*words, "--help")
    assert said.status == 0 and f"interp {' '.join(words)}" in said.out and said.err == ""


def test_no_command_shows_the_help(cli: Cli) -> None:
    assert cli().out.rstrip() == cli("--help").out.rstrip() and cli().status == 0
    assert cli("--version").out.startswith("interp ")


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
def test_sites(cli: Cli, kind: str) -> None:
    found = cli("sites", f"tiny-{kind}", "resid_*.0-1", "--json")
    names = {row["site"]: row for row in found.json["sites"]}
    assert set(names) == {f"resid_{side}.{layer}" for side in ("pre", "mid", "post") for layer in (0, 1)}
    assert names["resid_pre.0"]["shape"] == "batch pos d_model=32"
    shown = cli("sites", f"tiny-{kind}", "resid_*.0-1")
    assert shown.status == 0 and all(name in shown.out for name in names)


def test_models(cli: Cli, work: Path) -> None:
    found = cli("models", "--json")
    names = {row["model"]: row for row in found.json["models"]}
    assert {"smollm2-135m", "gemma3-270m", "tiny-llama", "tiny-gemma3", "tiny-gpt2"} <= set(names)
    assert all(row["installed"] or row["install"].startswith("pip install") for row in names.values())
    assert found.json["cache"] == str(work.parent / "cache")
    shown = cli("models")
    assert shown.status == 0 and all(name in shown.out for name in names)


def test_verify(cli: Cli) -> None:
    found = cli("verify", "tiny-llama", "--json")
    assert found.status == 0 and found.json["passed"] and found.json["max_abs_diff"] == 0
    assert len(found.json["checks"]) == found.json["n_checks"] > 50
    shown = cli("verify", "tiny-llama")
    assert shown.status == 0 and "gate * up == neurons" in shown.out and "FAILED" not in shown.out


def test_verify_says_no(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """One identity that does not hold: exit status 1, and it is named."""
    whole = probe.verify

    def failing(model: Any, **more: Any) -> Any:
        report = whole(model, **more)
        broken = dataclasses.replace(report.checks[3], passed=False, value=1.0)
        return dataclasses.replace(report, checks=(*report.checks[:3], broken, *report.checks[4:]))

    monkeypatch.setattr(probe, "verify", failing)
    found = cli("verify", "tiny-llama", "--json")
    name = f"{found.json['checks'][3]['name']} at {found.json['checks'][3]['site']}"
    assert (found.status, found.json["passed"], found.json["first_failure"]) == (1, False, name)
    shown = cli("verify", "tiny-llama")
    assert shown.status == 1 and f"First failure: {name}" in shown.out


def test_doctor(cli: Cli) -> None:
    found = cli("doctor", "--json")
    rows = {row["what"]: row for row in found.json["findings"]}
    assert {"python", "torch", "transformers", "model smollm2-135m", "cache"} <= set(rows)
    assert found.status == int(any(row["status"] == "problem" for row in rows.values()))
    assert all(row["fix"] for row in rows.values() if row["status"] != "ok")
    shown = cli("doctor")
    assert shown.status == found.status and all(name in shown.out for name in rows)


def test_list(cli: Cli, run_copy: Path) -> None:
    bad = run_copy.parent / "bad"
    bad.mkdir()
    (bad / "manifest.json").write_text("{", encoding="utf-8")
    first, second = cli("list", "--json").json["runs"]
    assert (first["run"], first["controls"]) == ("runs/bad", "damaged")
    n = len(load_run(run_copy).results[0].controls)
    assert (second["run"], second["methods"], second["report"]) == ("runs/small", ["massive"], False)
    assert second["controls"].endswith(f" of {n}")
    shown = cli("list")
    assert shown.status == 0 and "damaged" in shown.out and "runs/small" in shown.out


def test_report(cli: Cli, run_copy: Path) -> None:
    found = cli("report", "small", "--json").json
    page = run_copy / "report.html"
    assert found == {"report": "runs/small/report.html", "bytes": page.stat().st_size}
    assert cli("report", run_copy).out.strip() == page.as_posix()


def test_run_writes_a_folder(cli: Cli, work: Path) -> None:
    said = cli("run", "massive", *SMALL, "--out", "mine", "--json")
    assert said.status == 0 and set(said.json) == {"run", "summary", "controls"}
    folder = work / "mine"
    names = {path.name for path in folder.iterdir()}
    assert names == {"manifest.json", "summary.json", "tables", "tensors.safetensors", "report.html"}
    assert json.loads((folder / "summary.json").read_text(encoding="utf-8")) == said.json["summary"]
    (result,) = load_run(folder).results
    assert result.manifest.config["n_sequences"] == 2 and result.manifest.model.source == "tiny-llama"
    assert result.manifest.data["hash"] and result.tables
    assert len(said.json["controls"]["massive"]) == len(result.controls)
    assert {path.name for path in work.iterdir()} == {"mine"}, "a draft was left behind"


def test_run_prints_and_names_its_folder(cli: Cli, work: Path) -> None:
    said = cli("run", "massive", *SMALL, "--no-report")
    (folder,) = (work / "runs").iterdir()
    assert folder.name.startswith("massive-") and f"saved  runs/{folder.name}" in said.out
    assert "loss_zeroed" in said.out and "zeroed at another position" in said.out
    assert not (folder / "report.html").exists()


def test_a_run_replaces_a_run(cli: Cli, run_copy: Path) -> None:
    assert cli("run", "massive", *SMALL, "--seed", "5", "--no-report", "--out", run_copy).status == 0
    assert load_run(run_copy).results[0].manifest.config["seed"] == 5


def test_run_sae(cli: Cli, work: Path) -> None:
    said = cli("run", "sae", *SAE, "--d-dict", "64", "--k", "4", "--no-report", "--out", "s", "--json")
    assert said.status == 0 and said.json["summary"]["sae"]["l0"] == 4
    with safe_open(work / "s" / "sae_lens" / "sae_weights.safetensors", framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert shapes["W_enc"] == (32, 64) and shapes["W_dec"] == (64, 32)
    assert json.loads((work / "s" / "sae_lens" / "cfg.json").read_text(encoding="utf-8"))["d_sae"] == 64
    assert importlib.util.find_spec("sae_lens") is None or "sae_lens" not in said.err


def test_steer_extract(cli: Cli, work: Path) -> None:
    said = cli("steer", "extract", *TINY, "--n-pairs", "4", "--layer", "1", "--out", "v.safetensors", "--json")
    assert said.status == 0
    assert (said.json["vector"], said.json["site"], said.json["n_pairs"]) == ("v.safetensors", "resid_post.1", 4)
    with safe_open(work / "v.safetensors", framework="pt") as file:
        assert [tuple(file.get_tensor(name).shape) for name in file.keys()] == [(32,)]  # noqa: SIM118
        assert said.json["weight_hash"] in "".join((file.metadata() or {}).values())
    assert cli("steer", "extract", *TINY, "--n-pairs", "4", "--method", "pca").status == 0
    assert [path.name for path in (work / "runs" / "vectors").iterdir()] == ["tiny-llama.resid_post.1.safetensors"]


def test_steer_sweep(cli: Cli, work: Path) -> None:
    said = cli("steer", "sweep", *SWEEP, "--no-report", "--out", "st", "--json")
    assert said.status == 0 and said.json["summary"]["steering"]["site"] == "resid_post.1"
    assert load_run(work / "st").results[0].manifest.config["strengths"] == [-0.1, 0.1]


def test_patch(cli: Cli) -> None:
    said = cli("patch", *PAIR, "--corrupt", "ac", "--no-report", "--out", "p", "--json")
    assert said.status == 0 and said.json["summary"]["patching"]["n_prompts"] == 1
    assert cli("replay", "p").status == 0


def test_demo(cli: Cli, work: Path) -> None:
    """The demo without patching: the prompts of that are words, and the tiny tokenizer knows bytes."""
    configs = {"massive": {"n_sequences": 2, "length": 16, "n_draws": 1}}
    with console.progress() as steps:
        made = run_demo("tiny-llama", work / "demo", steps, methods=("massive",), configs=configs)
    summary = json.loads((work / "demo" / "summary.json").read_text(encoding="utf-8"))
    assert summary["verify"]["max_abs_diff"] == 0 and summary["verify"]["passed"] and summary["seconds"] > 0
    assert summary["manifest"] == "manifest.json" and summary["massive"]["dim"] == made.run.summary["massive"]["dim"]
    assert made.report.is_file()
    replayed = cli("replay", "demo", "--json").json["comparisons"]
    assert [row for row in replayed if row["method"] == "verify" and row["within"]]


def test_sites_that_can_only_be_read_are_marked(cli: Cli) -> None:
    said = cli("sites", "tiny-mixtral", "router_*.0")
    assert "router_experts.0 (read)" in said.out and "router_weights.0 (read)" not in said.out
    rows = {
        row["site"]: row["edit_instead"] for row in cli("sites", "tiny-mixtral", "router_*.0", "--json").json["sites"]
    }
    assert rows == {"router_logits.0": None, "router_experts.0": "router_logits.0", "router_weights.0": None}
