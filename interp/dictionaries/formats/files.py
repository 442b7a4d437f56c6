"""Reading and writing the files of foreign layouts: every failure is an ArtefactError, nothing is half written."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from interp.core.errors import ArtefactError, InterpError


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object."""
    try:
        raw: object = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtefactError(f"{path.parent} has no {path.name}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ArtefactError(f"{path} is damaged: {error}") from error
    if not isinstance(raw, dict):
        raise ArtefactError(f"{path} does not hold a JSON object")
    return cast("dict[str, Any]", raw)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file."""
    if not path.is_file():
        raise ArtefactError(f"{path.parent} has no {path.name}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"{path} is damaged: {error}") from error


def read_header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes by name and the metadata of a safetensors file, without reading the tensors."""
    try:
        with safe_open(path, framework="pt") as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
            return shapes, dict(opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"{path} is damaged: {error}") from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """One JSON object, plain values only."""
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file."""
    save_file(dict(tensors), path, metadata=dict(metadata) if metadata else None)


def publish(target: Path, fill: Callable[[Path], None], *, replaces: Callable[[Path], bool]) -> Path:
    """Let `fill` write a folder or a file under another name, then rename it to `target`.

    What is already there is replaced if `replaces` says that it is an older dictionary, and refused otherwise. It goes
    only when the new one has its name.
    """
    if (target.exists() or target.is_symlink()) and not replaces(target):
        raise ArtefactError(f"{target} exists and is not a saved dictionary; choose another folder")
    draft, old = (target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}" for _ in range(2))
    try:
        draft.parent.mkdir(parents=True, exist_ok=True)
        fill(draft)
        if target.is_dir():
            target.rename(old)
        try:
            draft.replace(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise
    except InterpError:
        raise
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise ArtefactError(f"could not write {target}: {error}; free space or choose another folder") from error
    finally:
        shutil.rmtree(old, ignore_errors=True)
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        elif draft.exists():
            draft.unlink()
    return target


def empty_or(*marks: str) -> Callable[[Path], bool]:
    """True for an empty folder, and for one that holds all the marked files."""

    def allowed(folder: Path) -> bool:
        return folder.is_dir() and (not any(folder.iterdir()) or all((folder / mark).is_file() for mark in marks))

    return allowed
