"""SPEC: the one constant that makes a file a method.

From it come the CLI verb, the README row, the report section, `interp replay` and the shared invariant tests, without
another file being touched.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from interp.core.errors import InterpError, unknown
from interp.core.result import Result

METHOD_PACKAGES = ("interp.analyses", "interp.circuits", "interp.steering")
"""Packages whose files may carry a SPEC."""


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far a replayed headline number may be from the saved one: |a - b| <= absolute + relative * |a|."""

    absolute: float = 0.0
    relative: float = 0.0

    def allows(self, saved: float, replayed: float) -> bool:
        return abs(saved - replayed) <= self.absolute + self.relative * abs(saved)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """How to find, run, explain and check one method."""

    name: str
    question: str
    """One line: the question the method answers."""
    paper: str
    """Authors, year, link."""
    config: type[Any]
    """Frozen keyword-only dataclass; every field has a default and a docstring line below it."""
    load: Callable[[Any, Any], Any]
    """`(model, config) -> data`: resolves the input that the config names."""
    run: Callable[[Any, Any, Any], Result]
    """`(model, data, config) -> Result`."""
    example: Callable[[Any], tuple[Any, Any]]
    """`model -> (data, config)`: a small case that runs in seconds on a tiny random model."""
    metrics: Mapping[str, str]
    """Metric name -> definition with its version, e.g. `fvu: "v1: ..."`."""
    tolerances: Mapping[str, Tolerance] = field(default_factory=dict[str, Tolerance])
    """Per headline number; `DEFAULT_TOLERANCE` for the rest."""


DEFAULT_TOLERANCE = Tolerance(absolute=1e-6, relative=1e-3)
"""For numbers recomputed on the same machine with the same versions and perhaps another number of threads."""


@cache
def discover() -> dict[str, Spec]:
    """Every method, by name, sorted. A file without a SPEC is a shared helper."""
    found: dict[str, Spec] = {}
    for package_name in METHOD_PACKAGES:
        try:
            package = importlib.import_module(package_name)
        except ModuleNotFoundError as error:
            if error.name == package_name:
                continue
            raise
        for info in pkgutil.iter_modules(package.__path__):
            spec = getattr(importlib.import_module(f"{package_name}.{info.name}"), "SPEC", None)
            if spec is None:
                continue
            if spec.name in found:
                raise InterpError(f"two methods are called {spec.name!r}; rename the one in {package_name}.{info.name}")
            found[spec.name] = spec
    return dict(sorted(found.items()))


def find(name: str) -> Spec:
    """The method of that name; the error lists the nearest names."""
    methods = discover()
    if name not in methods:
        raise unknown("method", name, methods)
    return methods[name]


def build_config(kind: type[Any], values: Mapping[str, Any]) -> Any:
    """A config from plain values; unknown keys and wrong types raise."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            raise unknown(f"option of {kind.__name__}", key, fields)
    defaults = kind()
    return dataclasses.replace(
        defaults, **{key: _coerce(kind, key, getattr(defaults, key), value) for key, value in values.items()}
    )


def _coerce(kind: type[Any], key: str, default: Any, value: Any) -> Any:
    """Turn JSON or command-line text into the type of the default."""
    try:
        if isinstance(default, bool):
            if str(value).lower() in ("true", "1", "yes", "on"):
                return True
            if str(value).lower() in ("false", "0", "no", "off"):
                return False
            raise ValueError(value)
        if isinstance(default, tuple):
            items = value.split(",") if isinstance(value, str) else list(value)
            element = type(default[0]) if default else str  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
            return tuple(element(item) for item in items)  # pyright: ignore[reportUnknownVariableType]
        if default is None or value is None:
            return value
        return type(default)(value)
    except (TypeError, ValueError) as error:
        raise InterpError(f"{kind.__name__}.{key}={value!r} is not a {type(default).__name__}") from error
