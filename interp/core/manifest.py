"""The manifest: everything needed to say where a result came from and to run it again."""

from __future__ import annotations

import dataclasses
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

TRACKED = (
    "interp",
    "torch",
    "transformers",
    "transformer-lens",
    "sae-lens",
    "numpy",
    "pandas",
    "safetensors",
    "triton",
)
"""Distributions whose versions are written down."""


def versions() -> dict[str, str]:
    """Installed version of each tracked distribution; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in TRACKED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_sha() -> str | None:
    """Commit of the checkout this package runs from, `None` outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        shown = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return shown.stdout.strip()


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """Which model, exactly."""

    source: str
    """What `interp.load` was given: a bundled name, a Hugging Face id, a path, or a class name."""
    family: str
    weight_hash: str
    dtype: str
    device: str
    attention: str
    """Attention kernel the model runs (`sdpa`, `eager`, ...)."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Where a result came from."""

    method: str
    model: ModelRecord
    config: Mapping[str, Any]
    data: Mapping[str, Any]
    """Name, size and content hash of the input."""
    sites: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    metrics: Mapping[str, str] = field(default_factory=dict[str, str])
    """Metric name -> definition with its version."""
    seconds: float = 0.0
    n_threads: int = field(default_factory=torch.get_num_threads)
    versions: Mapping[str, str] = field(default_factory=versions)
    git: str | None = field(default_factory=git_sha)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Manifest:
        fields = dict(raw)
        fields["model"] = ModelRecord(**fields["model"])
        fields["sites"], fields["seeds"] = tuple(fields["sites"]), tuple(fields["seeds"])
        return cls(**fields)
