"""A run on disk: `runs/<id>/` with manifest, summary, tables and tensors. No pickle, written whole or not at all.

Layout: `manifest.json` (format, one entry per result: manifest, panels, controls, notes), `summary.json` (headline
numbers, for scripts), `tables/<method>.<name>.parquet`, `tensors.safetensors` (`<method>.<name>`), and
`report.html` once `interp report` has rendered it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from interp.core.errors import ArtefactError, InterpError
from interp.core.manifest import Manifest
from interp.core.result import Control, LabelledTensor, Panel, Result

FORMAT = 1
"""Version of the folder layout."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Results that belong together, and facts about the run as a whole (for `summary.json`)."""

    results: tuple[Result, ...]
    facts: Mapping[str, Any]
    """Plain JSON values, e.g. `{"verify": {...}, "seconds": 93.1}`."""

    @property
    def summary(self) -> dict[str, Any]:
        """Headline numbers by method, then the facts."""
        return {r.method: dict(r.headline) for r in self.results} | dict(self.facts) | {"manifest": "manifest.json"}


def save_run(folder: Path, run: Run) -> Path:
    """Write a run folder. It appears whole under its name or not at all; an older run of that name is replaced."""
    methods = [result.method for result in run.results]
    if len(set(methods)) != len(methods):
        raise InterpError(f"a run holds one result per method, got {methods}")
    draft, old = (folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.{kind}" for kind in ("new", "old"))
    try:
        if folder.exists() and not folder.is_dir():
            raise ArtefactError(f"{folder} is a file; choose another folder")
        if folder.exists() and any(folder.iterdir()) and not (folder / "manifest.json").exists():
            raise ArtefactError(f"{folder} is not empty and not a run; choose another folder")
        draft.mkdir(parents=True)
        _write(draft, run)
        _swap(draft, folder, old)
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise ArtefactError(f"could not write {folder}: {reason}; free space or choose another folder") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return folder


def _swap(draft: Path, folder: Path, old: Path) -> None:
    """Give the draft its name; the older run moves aside first and comes back if that fails."""
    if folder.exists():
        folder.rename(old)
    try:
        draft.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise


def _write(folder: Path, run: Run) -> None:
    (folder / "tables").mkdir()
    tensors: dict[str, Tensor] = {}
    entries: list[dict[str, Any]] = []
    for result in run.results:
        for name, table in result.tables.items():
            table.to_parquet(folder / "tables" / f"{result.method}.{name}.parquet", index=False)
        for name, labelled in result.tensors.items():
            tensors[f"{result.method}.{name}"] = labelled.values.detach().cpu().clone().contiguous()
        entries.append(
            {
                "manifest": result.manifest.to_json(),
                "headline": dict(result.headline),
                "tables": list(result.tables),
                "tensors": {name: {"axes": t.axes, "unit": t.unit} for name, t in result.tensors.items()},
                "panels": [dataclasses.asdict(panel) for panel in result.panels],
                "controls": [dataclasses.asdict(control) for control in result.controls],
                "notes": result.notes,
            }
        )
    save_file(tensors, folder / "tensors.safetensors")
    write_json(folder / "manifest.json", {"format": FORMAT, "results": entries, "facts": dict(run.facts)})
    write_json(folder / "summary.json", run.summary)


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a temporary name, then rename. NaN and infinity are refused: JSON has no word for them."""
    try:
        text = json.dumps(value, indent=2, allow_nan=False, default=_plain)
    except ValueError as error:
        found = ", ".join(_not_finite(value)) or str(error)
        raise InterpError(f"{path.name} cannot hold NaN or infinity: {found}; leave it out or say None") from error
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        draft.write_text(text + "\n", encoding="utf-8")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} {value!r} is not a plain value")


def _not_finite(value: Any, name: str = "") -> Iterator[str]:
    """Where in a JSON-able value the numbers are that JSON cannot hold."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _not_finite(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _not_finite(item, f"{name}[{index}]")
    elif isinstance(value, float | np.floating) and not math.isfinite(value):
        yield f"{name} = {value}"


def load_run(folder: Path) -> Run:
    """Read a run folder back; a missing, foreign or damaged file is named."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise ArtefactError(f"{folder} is not a run: it has no manifest.json")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["format"] != FORMAT:
            raise ArtefactError(f"{path} has format {raw['format']!r}, this version reads {FORMAT}")
        results = tuple(_read(folder, entry) for entry in raw["results"])
        return Run(results=results, facts=raw["facts"])
    except ArtefactError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, SafetensorError, OSError) as error:
        # ValueError covers what json, parquet and our own checks raise.
        raise ArtefactError(f"{folder} is damaged or foreign: {type(error).__name__}: {error}") from error


def _read(folder: Path, entry: Mapping[str, Any]) -> Result:
    manifest = Manifest.from_json(entry["manifest"])
    with safe_open(folder / "tensors.safetensors", framework="pt") as file:
        tensors = {
            name: LabelledTensor(
                values=file.get_tensor(f"{manifest.method}.{name}"), axes=tuple(t["axes"]), unit=t["unit"]
            )
            for name, t in entry["tensors"].items()
        }
    return Result(
        headline=entry["headline"],
        tables={n: pd.read_parquet(folder / "tables" / f"{manifest.method}.{n}.parquet") for n in entry["tables"]},
        panels=tuple(Panel(**panel) for panel in entry["panels"]),
        controls=tuple(Control(**control) for control in entry["controls"]),
        manifest=manifest,
        tensors=tensors,
        notes=tuple(entry["notes"]),
    )
