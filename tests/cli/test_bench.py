"""`interp bench`: what it measures, in shapes small enough for a test; no time is asserted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from interp.cli import bench, bench_capture, bench_memory, bench_peers, main
from interp.cli.bench_capture import Group, relative_errors
from interp.models.tiny import tiny_model


def test_peak_memory_is_what_was_touched_while_it_ran() -> None:
    kept, peak = bench_memory.peak_bytes(lambda: torch.ones(8_000_000))  # 32 MB kept
    if peak is None:
        assert not Path("/proc/self/clear_refs").exists()
        return
    assert 30e6 < peak < 45e6
    _, passing = bench_memory.peak_bytes(lambda: float(torch.ones(32_000_000).sum()))  # 128 MB, freed before the end
    assert 126e6 < passing < 145e6
    _, nothing = bench_memory.peak_bytes(lambda: kept.add_(1))
    assert nothing is not None and nothing < 10e6


def test_systems_take_turns_and_are_compared_with_the_first() -> None:
    turns: list[str] = []

    def system(name: str, value: float) -> Any:
        return lambda: (turns.append(name), torch.full((2,), value))[1]

    group = Group(case="c", systems={"a": system("a", 1.0), "b": system("b", 1.25), "none": lambda: turns.append("n")})
    with bench._frozen():  # pyright: ignore[reportPrivateUsage]
        a, b, none = bench._race("w", group, rounds=3)  # pyright: ignore[reportPrivateUsage]
    assert "".join(turns) == "abn" * 4 + "abn"  # a warm-up, three turns, and one for memory
    assert (a.ratio, a.ratio_low, a.difference, b.difference, none.difference) == (1.0, 1.0, 0.0, 0.25, None)
    assert a.cpu_ratio == 1.0 and b.cpu_s >= 0
    assert b.low_s <= b.median_s <= b.high_s and b.ratio == b.median_s / a.median_s


def test_captures_leave_the_logits_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_peers, "peers", lambda _: ({}, {"nobody": "not installed"}))
    monkeypatch.setattr(bench_capture, "BATCH", (2, 8))
    out = tmp_path / "bench.json"
    argv = ["bench", "capture", "--model", "tiny-llama", "--rounds", "1", "--bf16", "--json", "--out", str(out)]
    assert main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text()) == found and [path.name for path in tmp_path.iterdir()] == ["bench.json"]
    ours = [t for t in found["timings"] if t["case"] != "bfloat16" and "layers 0 to" not in t["system"]]
    assert len(ours) == 7 and all(t["difference"] == 0 for t in ours)
    (stopped,) = [t for t in found["timings"] if "layers 0 to 1 only" in t["system"]]
    assert stopped["difference"] is None
    halves = [t["difference"] for t in found["timings"] if "bfloat16" in t["system"]]
    assert halves[0] == halves[1] > 0
    assert found["left_out"] == {"nobody": "not installed"}
    assert {"neurons", "logits", "pattern"} <= set(found["bf16_error"])


def test_relative_errors_are_those_of_the_rounding() -> None:
    """One rounding to 8 bits errs by at most 2**-8 of each value; a model that is not rounded does not err."""
    model, ids = tiny_model("llama"), torch.arange(14).view(2, 7)
    exact = relative_errors(model, tiny_model("llama"), ids)
    assert set(exact) == {str(site.part) for site in model.sites()} and not any(e["max"] for e in exact.values())
    rough = relative_errors(model, tiny_model("llama", dtype=torch.bfloat16), ids)
    assert 2**-12 < rough["embed"]["max"] <= 2**-8
    assert rough["embed"]["max"] < rough["logits"]["max"] < 0.2


def test_the_store_is_timed_against_raw_files_and_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from interp.instrument import store_bench

    monkeypatch.chdir(tmp_path)
    small = {name: getattr(store_bench, name) for name in ("write_systems", "read_systems")}
    for name, make in small.items():
        monkeypatch.setattr(store_bench, name, lambda folder, make=make: make(folder, 3000))
    assert main(["bench", "store", "--rounds", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] is None
    assert [t["system"] for t in found["timings"]] == [
        "raw write", "store write", "store statistics", "raw gather", "store gather",
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_refused_before_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "capture", "--model", "tiny-llama", "--out", "/nowhere/at/all.json"]) == 2
    assert "/nowhere/at/all.json is no file that can be written" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.needs_package("transformer_lens")
def test_peers_read_the_same_sites_and_give_the_same_logits() -> None:
    model, ids = tiny_model("llama"), torch.arange(14).view(2, 7)
    found, left_out = bench_peers.peers(model)
    names = {name.partition(",")[0].removesuffix(" forward") for name in found} | set(left_out)
    assert names == {"torch hooks", "TransformerBridge", "HookedTransformer", "nnsight"}
    assert "TransformerBridge" not in left_out and "HookedTransformer" not in left_out
    expected = model(ids)
    for name, run in found.items():
        torch.testing.assert_close(run(ids), expected, rtol=1e-3, atol=1e-3, msg=name)
    _, missing = bench_peers.peers(tiny_model("gpt2"))
    assert "AttributeError" in missing["torch hooks, by reference"] and "HookedTransformer" in missing
