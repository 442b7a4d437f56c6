"""Long work in stages that a killed run need not do again, within a time budget.

    with keeping(folder):            # a later call with the same key takes what is there
        stages = Stages.of(key)
        scores = stages.get("scores", lambda: {"values": ...})

Each stage is one safetensors file that carries the key (a hash of model, data and config); a file of another key is
made again. Without `keeping` nothing is written.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from interp.core.errors import ArtefactError

_folder: ContextVar[Path | None] = ContextVar("interp_stages", default=None)


@contextmanager
def keeping(folder: Path) -> Generator[None, None, None]:
    """Keep the stages of everything run inside in `folder`, and take those that are there."""
    token = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(token)


@dataclass(kw_only=True)
class Stages:
    """What was done so far."""

    key: str
    folder: Path | None
    taken: list[str] = field(default_factory=list[str])
    """Stages that were read instead of computed."""

    @staticmethod
    def of(key: str) -> Stages:
        return Stages(key=key, folder=_folder.get())

    def get(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of a stage, read or computed and kept."""
        if self.folder is None:
            return dict(make())
        path = self.folder / f"{name}.safetensors"
        found = self._read(path)
        if found is not None:
            self.taken.append(name)
            return found
        made = {label: value.detach().cpu().contiguous() for label, value in make().items()}
        draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(made, draft, metadata={"key": self.key})
            draft.replace(path)
        except (OSError, SafetensorError) as error:
            raise ArtefactError(f"could not write {path}: {error}; free space or choose another folder") from error
        finally:
            draft.unlink(missing_ok=True)
        return made

    def _read(self, path: Path) -> dict[str, Tensor] | None:
        """None where there is nothing usable: a damaged file is made again."""
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("key") != self.key:
                    return None
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return None


@dataclass(frozen=True, kw_only=True)
class Clock:
    """How much of a time budget is left."""

    seconds: float
    began: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.began)

    @property
    def is_up(self) -> bool:
        return self.left <= 0


def joined(parts: list[Tensor]) -> Tensor:
    """Chunks of draws, one after the other; none makes an empty one."""
    return torch.cat(parts) if parts else torch.zeros(0)
