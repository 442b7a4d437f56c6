"""The benchmark runs as a script from a bare folder, refuses to time wrong results, and writes what it measured."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from interp.kernels import bench, bench_parts

ROOT = Path(__file__).parents[2]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Isolated (-I): neither this checkout nor PYTHONPATH is importable."""
    return subprocess.run(
        [sys.executable, "-I", str(folder / "bench.py"), "--device", "cpu", "--threads", "1", *arguments],
        cwd=folder.parent,
        env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def copied(tmp_path: Path) -> Path:
    folder = tmp_path / "elsewhere" / "kernels"
    folder.mkdir(parents=True)
    for path in (ROOT / "kernels").glob("*.py"):
        shutil.copy(path, folder)
    return folder


@pytest.mark.slow
def test_runs_from_a_folder_of_its_own(tmp_path):
    out = tmp_path / "found.json"
    done = run(copied(tmp_path), "--shapes", "tiny", "--rounds", "1", "--only", "check", "kernels", "--json", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert all(row["ok"] for row in found["check"]) and len(found["check"]) >= 10
    names = [row["system"] for row in found["kernels"]["tiny"]]
    assert {"product", "top-k certified", "decode", "gradient to rows"} <= set(names)
    assert all(row["ms"] > 0 for row in found["kernels"]["tiny"])
    assert "top-k certified" in done.stdout and found["machine"]["torch"] == torch.__version__


def test_wrong_results_are_not_timed(tmp_path):
    folder = copied(tmp_path)
    source = (folder / "sparse_decode.py").read_text()
    wrong = source.replace("return summed.to(W_dec.dtype)", "return 1.01 * summed.to(W_dec.dtype)")
    assert wrong != source
    (folder / "sparse_decode.py").write_text(wrong)
    done = run(folder, "--shapes", "tiny", "--rounds", "1")
    assert done.returncode == 1 and "wrong results: nothing was timed" in done.stdout
    assert "ceiling" not in done.stdout


def test_shapes_are_listed_and_unknown_ones_refused(capsys):
    assert bench.main(["--shapes", "list"]) == 0
    listed = capsys.readouterr().out
    assert all(shape.name in listed for shape in bench_parts.SHAPES)
    with pytest.raises(SystemExit, match="unknown shapes"):
        bench.main(["--shapes", "huge"])
