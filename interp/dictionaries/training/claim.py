"""Whose is this folder? A run goes on only as what it was: `run.json` says what is trained on what."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from interp.core.errors import ArtefactError
from interp.dictionaries.training.parallel import Team

RUN = "run.json"


def resuming(asked: bool) -> bool:
    """Whether to go on with what is there: where that was asked for, and where TorchElastic started this again."""
    return asked or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def check_folder(folder: Path, resume: bool) -> None:
    """Raise ArtefactError where a run may not be written there."""
    if folder.exists() and not folder.is_dir():
        raise ArtefactError(f"{folder} is a file; choose another folder")
    if (folder / RUN).is_file():
        if not resume:
            raise ArtefactError(f"{folder} holds a run; go on with it with resume (--resume), or choose another folder")
    elif folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ArtefactError(f"{folder} is not empty and holds no run; choose another folder")


def claim(folder: Path, described: Mapping[str, Any], resume: bool, team: Team) -> None:
    """Make sure that the folder is this run's; every process of the team calls this."""
    check_folder(folder, resume)
    path = folder / RUN
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ArtefactError(f"{path} is damaged: {error}") from error
        if difference := _difference(found, json.loads(json.dumps(described))):
            raise ArtefactError(f"{folder} holds another run: {difference}; resume it as it was, or choose a folder")
    team.barrier()
    if team.ranks.rank == 0 and not path.is_file():
        draft = folder / f".{RUN}.draft"
        draft.write_text(json.dumps(described, indent=1), encoding="utf-8")
        draft.replace(path)


def _difference(old: Any, new: Any, where: str = "") -> str:
    """The first place where two JSON values differ, in words; empty where they do not."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in (*old, *(key for key in new if key not in old)):
            if found := _difference(old.get(key), new.get(key), f"{where}.{key}".lstrip(".")):
                return found
        return ""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return next((d for i, (a, b) in pairs if (d := _difference(a, b, f"{where}[{i}]"))), "")
    return "" if old == new else f"{where} was {old!r} and is now {new!r}"
