"""The command line as a user meets it: answers, JSON, run folders, replay, and one-line refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from interp.cli import main
from interp.cli.flags import flag_names, flag_rows, read_config
from interp.cli.replay import compare_values, differences
from interp.core.errors import InterpError
from interp.core.run import load_run
from interp.core.spec import Tolerance, discover
from interp.models.tiny import tiny_model

MODEL = ["--model", "tiny-llama"]
SMALL = ["--n-sequences", "2", "--length", "16", "--n-draws", "1", "--calibration-skip", "500"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small run, made through the command line."""
    out = tmp_path_factory.mktemp("runs") / "mine"
    assert main(["run", "massive", *MODEL, *SMALL, "--out", str(out)]) == 0
    return out


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line of a refusal."""
    capsys.readouterr()
    assert main(list(argv)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("interp: error:")]
    assert len(lines) == 1
    return lines[0]


def test_a_run_is_a_folder_with_everything_in_it(folder: Path) -> None:
    for name in ("manifest.json", "summary.json", "tensors.safetensors", "report.html"):
        assert (folder / name).is_file(), name
    assert list((folder / "tables").glob("massive.*.parquet"))
    summary = json.loads((folder / "summary.json").read_text())
    assert {"site", "pos", "dim", "loss_base", "loss_zeroed"} <= set(summary["massive"])
    (result,) = load_run(folder).results
    assert result.manifest.config["n_sequences"] == 2


@pytest.mark.parametrize(
    "argv",
    [["models"], ["sites", "tiny-llama"], ["verify", "tiny-llama"], ["doctor"], ["run", "massive", *MODEL, *SMALL]],
)
def test_json_is_one_document_on_stdout(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    status = main([*argv, "--json"])
    assert status in ((0, 1) if argv == ["doctor"] else (0,))
    assert json.loads(capsys.readouterr().out)


def test_sites_and_verify_say_what_they_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sites", "tiny-llama", "gate*.1"]) == 0
    shown = capsys.readouterr().out
    assert "gate_pre.1" in shown
    assert "blocks.1.mlp.hook_pre" in shown
    assert "resid_post.1" not in shown
    assert main(["verify", "tiny-llama", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["max_abs_diff"] == 0


def test_list_and_report_find_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder.parent.parent)
    (folder / "report.html").unlink()
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").stat().st_size > 1_000_000
    monkeypatch.chdir(folder.parent)
    Path("runs").symlink_to(folder.parent, target_is_directory=True)
    capsys.readouterr()
    assert main(["list"]) == 0
    assert "mine" in capsys.readouterr().out
    Path("runs").unlink()


def test_replay_agrees_and_names_what_was_changed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(folder)]) == 0
    capsys.readouterr()
    import shutil

    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    raw = json.loads((changed / "manifest.json").read_text())
    raw["results"][0]["headline"]["loss_base"] += 0.5
    raw["results"][0]["manifest"]["model"]["weight_hash"] = "0123456789abcdef"
    raw["results"][0]["manifest"]["data"]["hash"] = "fedcba9876543210"
    raw["results"][0]["manifest"]["versions"]["torch"] = "1.0"
    (changed / "manifest.json").write_text(json.dumps(raw))
    assert main(["replay", str(changed)]) == 1
    shown = capsys.readouterr().out
    for word in ("loss_base", "weight hash", "0123456789abcdef", "fedcba9876543210", "torch"):
        assert word in shown, word


def test_comparisons_follow_the_tolerances() -> None:
    saved: dict[str, Any] = {"a": 1.0, "b": 100, "c": "x", "d": [1.0, 2.0], "e": True, "seconds": 3.0, "gone": 1.0}
    fresh: dict[str, Any] = {"a": 1.0005, "b": 101, "c": "y", "d": [1.0, 2.1], "e": True, "seconds": 9.0, "new": 1}
    within = {row.key: row.within for row in compare_values("m", saved, fresh, {})}
    assert within == {
        "a": True, "b": False, "c": False, "d": False, "e": True, "seconds": True, "gone": False, "new": True
    }  # fmt: skip
    loose = compare_values("m", saved, fresh, {"b": Tolerance(absolute=1), "d": Tolerance(relative=0.1)})
    assert {row.key for row in loose if not row.within} == {"c", "gone"}
    tight = compare_values("m", {"a": 1.0}, {"a": 1.01}, {})
    assert not tight[0].within


def test_no_difference_is_named_where_there_is_none(folder: Path) -> None:
    manifest = load_run(folder).results[0].manifest
    assert differences(manifest, manifest) == []


def test_every_field_of_every_method_is_a_documented_flag() -> None:
    for spec in discover().values():
        names = flag_names(spec.config)
        rows = flag_rows(spec.config)
        for field in spec.config.__dataclass_fields__:
            assert any(name.removeprefix("--").replace("-", "_") == field for name in names), (spec.name, field)
        assert all(all(cell != "" for cell in row[:1]) and row[-1] for row in rows), spec.name


def test_flags_beat_set_beats_file(tmp_path: Path) -> None:
    config = discover()["massive"].config
    file = tmp_path / "c.yaml"
    file.write_text("length: 10\nseed: 1\nn_draws: 4\n")
    made = read_config(config, ["--length", "30"], ["length=20", "seed=2"], file)
    assert (made.length, made.seed, made.n_draws) == (30, 2, 4)
    steering = discover()["steering"].config
    made = read_config(steering, ["--depths", "0.5,0.75", "--steer-sinks", "true"], [], None)
    assert made.depths == (0.5, 0.75)
    assert made.steer_sinks is True


@pytest.mark.parametrize(
    ("text", "message"),
    [("length: ten", "length"), ("lenght: 10", "length"), ("- 1", "mapping|fields|key"), ("a: [", "YAML|yaml")],
)
def test_broken_config_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(InterpError, match=message):
        read_config(discover()["massive"].config, [], [], file)


BAD = [
    (["sites", "tiny-lama"], "tiny-llama"),
    (["sites", "tiny-llama", "resid_pots.1"], "resid_post"),
    (["sites", "tiny-llama", "resid_post.99"], "layers with resid_post: 0-2"),
    (["run", "massiv", *MODEL], "massive"),
    (["run", "massive", *MODEL, "--n-sequnces", "3"], "--n-sequences"),
    (["run", "massive", *MODEL, "--n-sequences", "three"], "three"),
    (["run", "massive", *MODEL, "--corpus", "docs:asignment"], "assignment"),
    (["run", "massive", *MODEL, "--corpus", "file:/dev/null"], "empty"),
    (["run", "massive", *MODEL, "--config", "absent.yaml"], "absent.yaml"),
    (["run", "sae", *MODEL, "--site", "resid_post.1", "--d-dict", "16", "--k", "17"], "k=17"),
    (["patch", *MODEL, "--clean", "ab", "--corrupt", "abc", "--right", "a", "--wrong", "b"], "2 tokens against 3"),
    (["replay", "runs/nothing"], "run"),
    (["verfy", "tiny-llama"], "verify"),
    (["run", "massive", "--device", "cuda:9", *MODEL], "cuda:9"),
    (["run", "massive", "--dtype", "float31", *MODEL], "float32"),
]


@pytest.mark.parametrize("case", range(len(BAD)), ids=[" ".join(argv)[:60] for argv, _ in BAD])
def test_bad_input_is_one_line_exit_2_and_nothing_written(
    case: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    argv, hint = BAD[case]
    assert hint in refused(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


def test_folders_that_are_no_model_or_no_run_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pickled = tmp_path / "pickled"
    tiny_model("llama").module.config.save_pretrained(pickled)  # pyright: ignore
    torch.save({}, pickled / "pytorch_model.bin")
    assert "pickles" in refused(capsys, "verify", str(pickled))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "precious.txt").write_text("keep")
    assert "not a run" in refused(capsys, "run", "massive", *MODEL, *SMALL, "--out", str(foreign))
    assert [path.name for path in foreign.iterdir()] == ["precious.txt"]
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "manifest.json").write_text("{")
    assert "damaged" in refused(capsys, "replay", str(damaged))


def test_steer_extract_writes_one_file_with_its_origin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "v.safetensors"
    argv = ["steer", "extract", *MODEL, "--n-pairs", "8", "--layer", "1", "--out", str(out), "--json"]
    assert main(argv) == 0
    said = json.loads(capsys.readouterr().out)
    assert out.is_file()
    assert said["site"] == "resid_post.1"
    reason = refused(capsys, "steer", "extract", *MODEL, "--layer", "9", "--out", str(out))
    assert "layers with resid_post: 0-2" in reason


def test_run_sae_saves_a_dictionary_that_others_read(tmp_path: Path) -> None:
    out = tmp_path / "sae"
    sizes = ["--n-sequences", "8", "--n-eval", "2", "--length", "32", "--d-dict", "64", "--k", "4", "--n-steps", "5"]
    argv = ["run", "sae", *MODEL, "--site", "resid_post.1", *sizes, "--batch-size", "32", "--out", str(out)]
    assert main(argv) == 0
    assert list(out.rglob("sae_weights.safetensors"))
    assert list(out.rglob("cfg.json"))
