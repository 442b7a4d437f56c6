"""The command line, in this process: `cli("run", "massive", ...)` gives exit status, stdout and stderr.

Each test works in an empty folder with an empty cache, so that "nothing was written" can be said about both.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from interp.cli import main

TINY_MASSIVE = ("--model", "tiny-llama", "--n-sequences", "2", "--length", "16", "--n-draws", "1")


@dataclass(frozen=True, kw_only=True)
class Said:
    """What one command answered."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Stdout as one JSON document; anything beside it is an error."""
        return json.loads(self.out)

    @property
    def reason(self) -> str:
        """The one line of a refusal. Every other line on stderr must be the progress of a step, with its time."""
        lines = self.err.splitlines()
        reasons = [line for line in lines if line.startswith("interp: error: ")]
        others = [line for line in lines if line not in reasons and not line.endswith(" s)")]
        assert self.status == 2, f"status {self.status}: {self.err}"
        assert len(reasons) == 1 and lines[-1] == reasons[0] and not others, self.err
        assert self.out == "", self.out
        return reasons[0]


Cli = Callable[..., Said]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, beside an empty cache."""
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def cli(work: Path, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run one command in the working folder."""
    assert work == Path.cwd()

    def run(*argv: object) -> Said:
        capsys.readouterr()
        status = main([str(word) for word in argv])
        text = capsys.readouterr()
        return Said(status=status, out=text.out, err=text.err)

    return run


@pytest.fixture(scope="session")
def saved_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run of `massive`, made through the command line; copy it before changing it."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    assert main(["run", "massive", *TINY_MASSIVE, "--no-report", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def run_copy(saved_run: Path, work: Path) -> Path:
    """The small run, by the name `runs/small` in the working folder."""
    return shutil.copytree(saved_run, work / "runs" / "small")
