"""Replay: what counts as the same number, and what is said when something is not as it was."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from interp.cli.replay import ABSENT, compare, compare_values, differences, is_time
from interp.core.manifest import Manifest, ModelRecord
from interp.core.result import Control, Result
from interp.core.spec import Tolerance, find

Cli = Callable[..., Any]
LOOSE = {"x": Tolerance(absolute=0.5)}
NONE: dict[str, Tolerance] = {}


def within(saved: Any, fresh: Any, tolerances: Mapping[str, Tolerance] = NONE, key: str = "x") -> bool:
    (row,) = compare_values("toy", {key: saved}, {key: fresh}, tolerances)
    assert (row.method, row.key, row.saved, row.fresh) == ("toy", key, saved, fresh)
    return row.within


@pytest.mark.parametrize(
    ("saved", "fresh", "same"),
    [
        (2.0, 2.001, True),  # 1e-6 + 1e-3 of the saved number is allowed
        (2.0, 2.01, False),
        (-2.0, -2.001, True),
        (2.0, -2.0, False),
        (0.0, 1e-7, True),
        (0.0, 1e-5, False),
        (507, 507, True),  # whole numbers name things
        (507, 508, False),
        (100_000, 100_001, False),
        (1.0, 1, True),
        ("resid_post.11", "resid_post.11", True),
        ("resid_post.11", "resid_post.10", False),
        ("1", 1, False),
        (True, True, True),
        (True, False, False),
        (True, 1, False),
        (False, 0.0, False),
        (None, None, True),
        (None, 0.0, False),
        (0.5, None, False),
        ([1.0, 2.0], [1.0005, 2.001], True),
        ([1.0, 2.0], [1.0, 2.1], False),
        ([1.0, 2.0], [1.0], False),
        ([], [], True),
        (["z.1", "z.2"], ["z.2", "z.1"], False),
        (["z.1", 3, 1.0], ("z.1", 3, 1.0001), True),
        ({"a": 1.0, "b": "s"}, {"b": "s", "a": 1.0001}, True),
        ({"a": 1.0}, {"a": 1.0, "b": 2.0}, False),
        ({"a": [1, 2]}, {"a": [1, 3]}, False),
        ([1.0], 1.0, False),
        (1.0, float("nan"), False),
    ],
)
def test_default_tolerance_by_type(saved: Any, fresh: Any, same: bool) -> None:
    assert within(saved, fresh) is same


def test_a_tolerance_belongs_to_its_key() -> None:
    assert within(2.0, 2.4, LOOSE) and not within(2.0, 2.6, LOOSE)
    assert not within(2.0, 2.4, LOOSE, key="y")
    assert within([1, 2.0], [1, 2.4], LOOSE) and not within([1, 2.0], [2, 2.4], LOOSE)
    assert within(200.0, 201.9, {"x": Tolerance(relative=0.01)}) and not within(
        200.0, 202.1, {"x": Tolerance(relative=0.01)}
    )


def test_the_allowance_is_said() -> None:
    rows = compare_values("toy", {"x": 1.0, "y": 1.0, "n": 3}, {"x": 1.0, "y": 1.0, "n": 3}, LOOSE)
    assert [row.allowed for row in rows] == ["± 0.5", "± 1e-06 + 0.001 × saved", "equal"]


def test_a_lost_key_fails_and_a_new_one_is_shown() -> None:
    lost, new = compare_values("toy", {"gone": 1.0}, {"fresh": 2.0}, {})
    assert (lost.key, lost.fresh, lost.within) == ("gone", ABSENT, False)
    assert (new.key, new.saved, new.within, new.allowed) == ("fresh", ABSENT, True, "new in this version")


def test_times_are_never_compared() -> None:
    assert within(1.0, 900.0, key="seconds") and within(1.0, 900.0, key="seconds_exact")
    assert within(1.0, 900.0, key="exact_seconds")
    assert not is_time("secondsight") and not within(1.0, 900.0, key="second")


def manifest(**changes: Any) -> Manifest:
    model = ModelRecord(
        source="tiny", family="llama", weight_hash="ab12", dtype="float32", device="cpu", attention="sdpa"
    )
    fields: dict[str, Any] = {
        "method": "massive", "model": model, "config": {"kinds": ("a", "b")}, "data": {"hash": "cd34"},
        "seeds": (0,), "n_threads": 2, "versions": {"torch": "2.13.0", "numpy": "2.0"}, "git": "c0ffee",
    }  # fmt: skip
    return Manifest(**(fields | changes))


def result(headline: Mapping[str, Any], **passed: bool) -> Result:
    controls = tuple(
        Control(name=name, statistic="s", observed=1.0, control=0.0, passed=value) for name, value in passed.items()
    )
    tables: dict[str, pd.DataFrame] = {}
    return Result(headline=headline, tables=tables, panels=(), controls=controls, manifest=manifest())


def test_compare_uses_the_tolerances_of_the_method() -> None:
    spec = dataclasses.replace(find("massive"), tolerances=LOOSE)
    rows = compare(result({"x": 1.0, "y": 1.0}, c=True), result({"x": 1.4, "y": 1.4}, c=True), spec)
    assert {row.key: row.within for row in rows} == {"x": True, "y": False, "control: c": True}


@pytest.mark.parametrize("then", [True, False])
def test_a_control_that_changes_its_verdict_fails(then: bool) -> None:
    spec = find("massive")
    same, flipped = compare(result({}, a=then, b=then), result({}, a=then, b=not then), spec)
    assert same.within and (flipped.key, flipped.within) == ("control: b", False)
    (gone,) = compare(result({}, a=then), result({}, other=then), spec)
    assert (gone.fresh, gone.within) == (ABSENT, False)


def test_equal_manifests_differ_in_nothing() -> None:
    assert differences(manifest(), manifest(created="another day", seconds=99.0)) == []
    assert differences(manifest(config={"kinds": ["a", "b"]}), manifest()) == []  # JSON has no tuples


@pytest.mark.parametrize(
    ("changes", "what", "saved", "fresh"),
    [
        ({"model": {"weight_hash": "ff"}}, "model weight hash", "ab12", "ff"),
        ({"model": {"device": "cuda:0"}}, "model device", "cpu", "cuda:0"),
        ({"model": {"dtype": "float64"}}, "model dtype", "float32", "float64"),
        ({"model": {"attention": "eager"}}, "model attention", "sdpa", "eager"),
        ({"data": {"hash": "ee"}}, "data hash", "cd34", "ee"),
        ({"data": {}}, "data hash", "cd34", ABSENT),
        ({"config": {"kinds": ("a",)}}, "config kinds", ("a", "b"), ("a",)),
        ({"metrics": {"fvu": "v2"}}, "metric fvu", ABSENT, "v2"),
        ({"versions": {"torch": "2.14.0", "numpy": "2.0"}}, "version of torch", "2.13.0", "2.14.0"),
        ({"versions": {"torch": "2.13.0"}}, "version of numpy", "2.0", ABSENT),
        ({"seeds": (1,)}, "seeds", [0], [1]),
        ({"n_threads": 1}, "threads", 2, 1),
        ({"git": None}, "code", "c0ffee", None),
    ],
)
def test_what_changed_is_named(changes: dict[str, Any], what: str, saved: Any, fresh: Any) -> None:
    if "model" in changes:
        changes = {"model": dataclasses.replace(manifest().model, **changes["model"])}
    (found,) = differences(manifest(), manifest(**changes))
    assert (found.method, found.what, found.saved, found.fresh) == ("massive", what, saved, fresh)


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the first result of a saved run."""
    path = folder / "manifest.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    change(raw["results"][0])
    path.write_text(json.dumps(raw), encoding="utf-8")


def test_a_run_replays(cli: Cli, run_copy: Path) -> None:
    said = cli("replay", run_copy, "--json")
    assert (said.status, said.json["replayed"]) == (0, True)
    saved = json.loads((run_copy / "summary.json").read_text())["massive"]
    fresh = {row["key"]: row["fresh"] for row in said.json["comparisons"]}
    assert saved and {key: fresh[key] for key in saved} == pytest.approx(saved)
    named = {row["what"] for row in said.json["differences"]}
    assert named <= {"code"}, "the same process differs from itself"


def test_a_run_is_found_by_its_name_and_shown_as_a_table(cli: Cli, run_copy: Path) -> None:
    assert run_copy.is_dir()
    said = cli("replay", "small")
    assert said.status == 0 and "numbers are within tolerance" in said.out and "OUT" not in said.out


@pytest.mark.parametrize(("key", "value"), [("loss_base", 7.0), ("dim", 31), ("site", "resid_post.0")])
def test_a_number_that_was_changed_is_named(cli: Cli, run_copy: Path, key: str, value: Any) -> None:
    edit(run_copy, lambda entry: entry["headline"].update({key: value}))
    said = cli("replay", run_copy, "--json")
    assert (said.status, said.json["replayed"]) == (1, False)
    out = [(row["key"], row["saved"]) for row in said.json["comparisons"] if not row["within"]]
    assert out == [(key, value)]
    shown = cli("replay", run_copy)
    (line,) = [line for line in shown.out.splitlines() if "OUT" in line]
    assert shown.status == 1 and key in line
    assert f"1 of {len(said.json['comparisons'])} numbers are out of tolerance." in shown.out


def test_a_control_that_was_changed_is_named(cli: Cli, run_copy: Path) -> None:
    edit(run_copy, lambda entry: entry["controls"][0].update(passed=not entry["controls"][0]["passed"]))
    said = cli("replay", run_copy, "--json")
    out = [row["key"] for row in said.json["comparisons"] if not row["within"]]
    assert said.status == 1 and len(out) == 1 and out[0].startswith("control: 1 ordinary dims")


@pytest.mark.parametrize(
    ("where", "key", "what"),
    [("model", "weight_hash", "model weight hash"), ("data", "hash", "data hash"), ("versions", "torch", "torch")],
)
def test_other_weights_data_or_versions_are_named(cli: Cli, run_copy: Path, where: str, key: str, what: str) -> None:
    edit(run_copy, lambda entry: entry["manifest"][where].update({key: "other"}))
    said = cli("replay", run_copy, "--json")
    assert said.status == 0, "the numbers are the same"
    (row,) = [row for row in said.json["differences"] if what in row["what"]]
    assert row["saved"] == "other" and row["fresh"] != "other"
    shown = cli("replay", run_copy)
    assert "Not as it was" in shown.out and what in shown.out


def test_a_method_that_is_not_here(cli: Cli, run_copy: Path) -> None:
    def rename(entry: dict[str, Any]) -> None:
        entry["manifest"]["method"] = "masive"
        entry.update(tables=[], tensors={}, panels=[])

    edit(run_copy, rename)
    assert "unknown method 'masive'; nearest: massive" in cli("replay", run_copy).reason


def test_a_config_from_another_version(cli: Cli, run_copy: Path) -> None:
    edit(run_copy, lambda entry: entry["manifest"]["config"].update(lenght=3))
    assert "option of MassiveConfig 'lenght'; nearest: length" in cli("replay", run_copy).reason


def test_no_such_device(cli: Cli, run_copy: Path) -> None:
    assert "device 'cuda:99' is not on this machine" in cli("replay", run_copy, "--device", "cuda:99").reason


def test_no_such_run(cli: Cli, run_copy: Path) -> None:
    assert run_copy.is_dir()
    assert "unknown run 'smal'; nearest: runs/small" in cli("replay", "smal").reason
