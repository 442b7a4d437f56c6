"""interp: capture, edit and explain the activations of gated models.

    import interp
    model = interp.load("smollm2-135m")
    with interp.capture(model, "resid_post.*") as acts:
        model(interp.tokenize(model, ["The Eiffel Tower is in"]))

The names below are what a notebook needs; everything else is in the submodules.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interp.core.errors import InterpError as InterpError
    from interp.core.run import Run as Run
    from interp.core.run import load_run as load_run
    from interp.core.run import save_run as save_run
    from interp.core.sites import Site as Site
    from interp.instrument import edits as edits
    from interp.instrument import experts as experts
    from interp.instrument.capture import capture as capture
    from interp.instrument.edits import edited as edited
    from interp.instrument.tokens import tokenize as tokenize
    from interp.models.family import Block as Block
    from interp.models.family import Reach as Reach
    from interp.models.family import register_block as register_block
    from interp.models.load import load as load
    from interp.models.probe import verify as verify
    from interp.models.user_mlp import register_mlp as register_mlp
    from interp.report.show import show as show
    from interp.tasks.corpora import load_corpus as load_corpus

_HOME = {
    "Block": "interp.models.family",
    "InterpError": "interp.core.errors",
    "Reach": "interp.models.family",
    "Run": "interp.core.run",
    "Site": "interp.core.sites",
    "capture": "interp.instrument.capture",
    "edited": "interp.instrument.edits",
    "load": "interp.models.load",
    "load_corpus": "interp.tasks.corpora",
    "load_run": "interp.core.run",
    "register_block": "interp.models.family",
    "register_mlp": "interp.models.user_mlp",
    "save_run": "interp.core.run",
    "show": "interp.report.show",
    "tokenize": "interp.instrument.tokens",
    "verify": "interp.models.probe",
}
__all__ = ["edits", "experts", "run", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def run(method: str, model: Any, **options: Any) -> Any:
    """Run a method by name, e.g. `run("massive", model, n_sequences=4)`; options are fields of its config."""
    from interp.core.spec import build_config, find

    spec = find(method)
    config = build_config(spec.config, options)
    return spec.run(model, spec.load(model, config), config)


def __getattr__(name: str) -> Any:
    if name in ("edits", "experts"):
        return importlib.import_module(f"interp.instrument.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'interp' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
