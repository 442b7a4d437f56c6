"""`interp doctor`: what this machine has, what is missing, and the exact command that fixes it.

Bounds come from the package's own requirements, so they cannot drift from what is installed with it.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import typer

from interp.cli import console, options

Status = Literal["ok", "note", "problem"]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WORDS = {"ok": ("✓ ok", "green"), "note": ("– note", "yellow"), "problem": ("✗ problem", "bold red")}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    what: str
    status: Status
    detail: str
    fix: str = ""
    """Command, or the next step; empty where nothing has to be done."""


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Start here")(doctor)


def doctor(as_json: options.Json = False) -> None:
    """What is installed, what is missing, and the command that fixes it. (exit status 1 on a problem)"""
    found = list(examine())
    if as_json:
        console.emit_json({"findings": [vars(finding) for finding in found]})
    else:
        from rich.text import Text

        rows = [(f.what, Text(*WORDS[f.status]), f.detail, f.fix) for f in found]
        console.table("", ("", "", "found", "what to do"), rows)
    if any(finding.status == "problem" for finding in found):
        raise typer.Exit(1)


def examine() -> Iterator[Finding]:
    """Everything the doctor looks at, in order of importance."""
    yield from _python()
    yield from _packages()
    yield _torchvision()
    yield from _torch()
    yield from _models()
    yield _cache()
    yield _browser()


def _python() -> Iterator[Finding]:
    version, good = platform.python_version(), sys.version_info >= (3, 11)
    yield Finding(
        what="python",
        status="ok" if good else "problem",
        detail=f"{version} on {platform.system()} {platform.machine()}",
        fix="" if good else "install Python 3.11 or newer, then: make demo",
    )


def requirements() -> list[str]:
    """What interp asks for: from its metadata, or from pyproject.toml in a checkout."""
    checkout = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if checkout.is_file():
        import tomllib

        return list(tomllib.loads(checkout.read_text(encoding="utf-8"))["project"].get("dependencies", []))
    try:
        return [text for text in metadata.requires("interp") or [] if "extra ==" not in text]
    except metadata.PackageNotFoundError:
        return []


def _packages() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    for text in requirements():
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        have = installed(wanted.name)
        bounds = str(wanted.specifier) or "any version"
        command = f'pip install "{wanted.name}{wanted.specifier}"'
        if have is None:
            yield Finding(what=wanted.name, status="problem", detail=f"missing; needs {bounds}", fix=command)
        elif not wanted.specifier.contains(have, prereleases=True):
            yield Finding(what=wanted.name, status="problem", detail=f"{have} is outside {bounds}", fix=command)
        else:
            yield Finding(what=wanted.name, status="ok", detail=f"{have} ({bounds})")


def installed(name: str) -> str | None:
    """Version of a distribution, None where it is absent."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _torchvision() -> Finding:
    """A torchvision built for another torch breaks `import transformers`; it is not needed here."""
    from packaging.requirements import Requirement

    have, torch = installed("torchvision"), installed("torch")
    if have is None or torch is None:
        return Finding(what="torchvision", status="ok", detail="not installed, and not needed")
    for text in metadata.requires("torchvision") or []:
        wanted = Requirement(text)
        if wanted.name == "torch" and not wanted.specifier.contains(torch, prereleases=True):
            return Finding(
                what="torchvision",
                status="problem",
                detail=f"{have} wants torch{wanted.specifier}, here is {torch}: transformers cannot be imported",
                fix="pip uninstall -y torchvision",
            )
    return Finding(what="torchvision", status="ok", detail=f"{have} fits torch {torch}")


def _torch() -> Iterator[Finding]:
    if installed("torch") is None:
        return
    import torch

    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    yield Finding(
        what="threads",
        status="ok" if threads <= cores else "note",
        detail=f"torch uses {threads} of {cores} cores",
        fix="" if threads <= cores else f"export OMP_NUM_THREADS={cores}",
    )
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield Finding(what="GPU", status="ok", detail=", ".join(names) or "none; everything runs on the CPU")


def _models() -> Iterator[Finding]:
    from interp.models.bundled import BUNDLED

    for model in BUNDLED.values():
        there = model.installed
        yield Finding(
            what=f"model {model.name}",
            status="ok" if there else "note",
            detail=model.about if there else "not installed",
            fix="" if there else model.install,
        )
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        yield Finding(what="hub", status="ok", detail="offline (HF_HUB_OFFLINE=1): other models must be on this disk")


def _cache() -> Finding:
    from interp.models.bundled import cache_dir

    folder = cache_dir()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(place).free
    enough = free > 2e9
    return Finding(
        what="cache",
        status="ok" if enough else "note",
        detail=f"{folder}: {size / 1e9:.2f} GB used, {free / 1e9:.0f} GB free",
        fix="" if enough else f"free 2 GB, or: export INTERP_CACHE=FOLDER (safe to delete: {folder})",
    )


def _browser() -> Finding:
    path = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if path:
        return Finding(what="chromium", status="ok", detail=path)
    return Finding(
        what="chromium",
        status="note",
        detail="not found; only the browser tests of the report need it",
        fix="apt-get install chromium",
    )


def findings_json(found: list[Finding]) -> list[dict[str, Any]]:
    """Findings as plain values."""
    return [vars(finding) for finding in found]
