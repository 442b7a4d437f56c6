"""A run folder comes back equal, is written whole or not at all, and says what is wrong when it is damaged."""

from __future__ import annotations

import dataclasses
import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import SafetensorError

from interp.core import run as run_module
from interp.core.errors import ArtefactError, InterpError
from interp.core.manifest import Manifest, ModelRecord
from interp.core.result import Control, LabelledTensor, Panel, Result
from interp.core.run import Run, load_run, save_run, write_json

TENSORS = {
    "half": torch.randn(3, 2).bfloat16(),
    "mask": torch.tensor([True, False]),
    "ids": torch.arange(4),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(1.25),
    "strided": torch.randn(4, 3).T,
    "with_grad": torch.randn(2, requires_grad=True),
}


def result(method: str = "toy", **changes: Any) -> Result:
    model = ModelRecord(
        source="tiny", family="llama", weight_hash="ab12", dtype="float32", device="cpu", attention="sdpa"
    )
    fields: dict[str, Any] = {
        "headline": {"effect": 0.1 + 0.2, "site": "z.3", "passed": True, "nothing": None, "top": ["a", "b"]},
        "tables": {
            "effects": pd.DataFrame({"layer": [0, 1], "effect": [0.5, float("nan")], "token": ["<b>", " é"]}),
            "none": pd.DataFrame({"layer": pd.Series(dtype="int64")}),
        },
        "panels": (Panel(title="Effect", kind="line", table="effects", x="layer", y="effect", log_y=True),),
        "controls": (Control(name="random", statistic="mean", observed=1.5, control=0.2, passed=True, p_value=0.01),),
        "manifest": Manifest(method=method, model=model, config={"k": 4}, data={"hash": "cd34"}, seeds=(1,)),
        "tensors": {
            name: LabelledTensor(values=values, axes=tuple("abc"[: values.ndim]), unit="nats")
            for name, values in TENSORS.items()
        },
        "notes": ("a note",),
    }
    return Result(**(fields | changes))


def same(a: Result, b: Result) -> None:
    for field in ("headline", "panels", "controls", "manifest", "notes"):
        assert getattr(a, field) == getattr(b, field), field
    assert list(a.tables) == list(b.tables)
    for name in a.tables:
        pd.testing.assert_frame_equal(a.tables[name], b.tables[name])
    assert set(a.tensors) == set(b.tensors)
    for name, labelled in a.tensors.items():
        assert labelled.axes == b.tensors[name].axes
        assert labelled.unit == b.tensors[name].unit
        assert labelled.values.dtype == b.tensors[name].values.dtype
        assert torch.equal(labelled.values, b.tensors[name].values)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_round_trip(tmp_path: Path) -> None:
    run = Run(results=(result(), result("other", tensors={}, notes=())), facts={"seconds": 1.5, "verify": {"d": 0.0}})
    folder = save_run(tmp_path / "deep" / "demo", run)
    loaded = load_run(folder)
    for before, after in zip(run.results, loaded.results, strict=True):
        same(before, after)
    assert loaded.facts == run.facts
    assert leftovers(tmp_path / "deep") == []
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["toy"]["effect"] == 0.1 + 0.2
    assert summary["verify"]["d"] == 0.0
    assert summary["manifest"] == "manifest.json"
    assert not [path for path in folder.rglob("*") if path.suffix in (".pkl", ".pt", ".bin")]


def test_a_run_without_results(tmp_path: Path) -> None:
    save_run(tmp_path / "r", Run(results=(), facts={}))
    assert load_run(tmp_path / "r").results == ()


def test_tensors_that_share_memory_are_saved_apart(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    tensors = {
        name: LabelledTensor(values=values, axes=("i",))
        for name, values in {"all": base, "same": base, "part": base[2:4]}.items()
    }
    loaded = load_run(save_run(tmp_path / "r", Run(results=(result(tensors=tensors),), facts={})))
    assert torch.equal(loaded.results[0].tensors["part"].values, base[2:4])
    assert torch.equal(loaded.results[0].tensors["same"].values, base)


def test_numpy_scalars_are_plain_values(tmp_path: Path) -> None:
    headline = {"f": np.float32(0.5), "i": np.int64(3), "b": np.bool_(True)}
    loaded = load_run(save_run(tmp_path / "r", Run(results=(result(headline=headline),), facts={})))
    assert loaded.results[0].headline == {"f": 0.5, "i": 3, "b": True}


def test_a_newer_run_replaces_the_older(tmp_path: Path) -> None:
    save_run(tmp_path / "r", Run(results=(result("old"),), facts={}))
    (tmp_path / "r" / "report.html").write_text("of the old run")
    save_run(tmp_path / "r", Run(results=(result("new"),), facts={}))
    assert [r.method for r in load_run(tmp_path / "r").results] == ["new"]
    assert not (tmp_path / "r" / "report.html").exists()
    assert leftovers(tmp_path) == []


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(ArtefactError, match="not empty and not a run"):
        save_run(tmp_path / "thesis", Run(results=(result(),), facts={}))
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    with pytest.raises(ArtefactError, match="is a file"):
        save_run(tmp_path / "thesis" / "chapter.txt", Run(results=(result(),), facts={}))
    with pytest.raises(ArtefactError, match="could not write"):
        save_run(tmp_path / "thesis" / "chapter.txt" / "run", Run(results=(result(),), facts={}))
    save_run(tmp_path / "empty", Run(results=(), facts={}))


def test_one_result_a_method(tmp_path: Path) -> None:
    with pytest.raises(InterpError, match="one result per method"):
        save_run(tmp_path / "r", Run(results=(result(), result()), facts={}))
    assert list(tmp_path.iterdir()) == []


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_in_rust(*_: object, **__: object) -> None:
    raise SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("older", [False, True], ids=["nothing there", "older run there"])
@pytest.mark.parametrize(
    ("target", "fails"),
    [
        ("pandas.DataFrame.to_parquet", full),
        ("interp.core.run.save_file", full_in_rust),
        ("interp.core.run.os.replace", full),
        ("pathlib.Path.write_text", full),
        ("interp.core.run._swap", full),
    ],
)
def test_a_full_disk_leaves_nothing_and_keeps_the_old_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, fails: Callable[..., None], older: bool
) -> None:
    if older:
        save_run(tmp_path / "r", Run(results=(result("old"),), facts={}))
    with monkeypatch.context() as patch:
        patch.setattr(target, fails)
        with pytest.raises(ArtefactError, match=r"could not write .*No space left.*free space"):
            save_run(tmp_path / "r", Run(results=(result("new"),), facts={}))
    assert [path.name for path in tmp_path.iterdir()] == (["r"] if older else [])
    if older:
        assert [r.method for r in load_run(tmp_path / "r").results] == ["old"]


def test_the_old_run_comes_back_when_the_new_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_run(tmp_path / "r", Run(results=(result("old"),), facts={}))
    rename = Path.rename

    def refuse_new(self: Path, target: Path) -> Path:
        if self.name.endswith(".new"):
            full()
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse_new)
        with pytest.raises(ArtefactError, match="No space left"):
            save_run(tmp_path / "r", Run(results=(result("new"),), facts={}))
    assert [r.method for r in load_run(tmp_path / "r").results] == ["old"]
    assert leftovers(tmp_path) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_run(tmp_path / "r", Run(results=(result(),), facts={}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float64("nan"), [1.0, {"deep": float("-inf")}]])
def test_nan_is_refused_by_name(tmp_path: Path, value: object) -> None:
    with pytest.raises(InterpError, match=r"NaN or infinity: .*headline\.effect"):
        save_run(tmp_path / "r", Run(results=(result(headline={"effect": value}),), facts={}))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InterpError, match=r"x\.json cannot hold NaN"):
        write_json(tmp_path / "x.json", {"a": value})
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_is_not_a_headline(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not a plain value"):
        save_run(tmp_path / "r", Run(results=(result(headline={"effect": torch.tensor(1.0)}),), facts={}))
    assert list(tmp_path.iterdir()) == []


def edit_manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        raw = json.loads((folder / "manifest.json").read_text())
        change(raw)
        (folder / "manifest.json").write_text(json.dumps(raw))

    return damage


def cut(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return damage


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "is not a run"),
        (cut("manifest.json"), "JSONDecodeError"),
        (lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe\x00"), "UnicodeDecodeError"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "damaged or foreign"),
        (lambda folder: (folder / "manifest.json").write_text('{"model": "gpt2"}'), "KeyError"),
        (edit_manifest(lambda raw: raw.update(format=99)), "has format 99, this version reads 1"),
        (edit_manifest(lambda raw: raw.update(results="none")), "damaged or foreign"),
        (edit_manifest(lambda raw: raw["results"][0].update(tensors=["half"])), "damaged or foreign"),
        (edit_manifest(lambda raw: raw["results"][0]["manifest"].update(colour="red")), "colour"),
        (edit_manifest(lambda raw: raw["results"][0]["manifest"].pop("model")), "model"),
        (edit_manifest(lambda raw: raw["results"][0].update(controls=[])), "no control"),
        (edit_manifest(lambda raw: raw["results"][0]["panels"][0].update(x="elsewhere")), "elsewhere"),
        (edit_manifest(lambda raw: raw["results"][0]["tensors"]["half"].update(axes=["a"])), "axes"),
        (edit_manifest(lambda raw: raw["results"][0]["tensors"].update(gone={"axes": [], "unit": ""})), "gone"),
        (cut("tensors.safetensors"), "damaged or foreign"),
        (lambda folder: (folder / "tensors.safetensors").unlink(), "tensors.safetensors"),
        (cut("tables/toy.effects.parquet"), "damaged or foreign"),
        (lambda folder: (folder / "tables" / "toy.effects.parquet").unlink(), "toy.effects.parquet"),
    ],
)
def test_damage_is_one_error_that_names_the_folder(tmp_path: Path, damage: Callable[[Path], None], says: str) -> None:
    folder = save_run(tmp_path / "r", Run(results=(result(),), facts={}))
    damage(folder)
    with pytest.raises(ArtefactError, match=says) as caught:
        load_run(folder)
    assert str(folder) in str(caught.value)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="no manifest.json"):
        load_run(tmp_path / "nowhere")


def test_write_json_keeps_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "x.json", {"a": 1})
    monkeypatch.setattr("interp.core.run.os.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_json(tmp_path / "x.json", {"a": 2})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_run_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Run(results=(), facts={}).facts = {}
