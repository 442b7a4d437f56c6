"""SPEC: the one constant that makes a file a method.

From it come the CLI verb, the README row, the report section, `interp replay` and the shared invariant tests, without
another file being touched.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

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
    """A config from plain values (JSON, YAML or command-line text); unknown keys and wrong types raise."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            raise unknown(f"option of {kind.__name__}", key, fields)
    hints = get_type_hints(kind)
    return kind(**{key: _coerce(f"{kind.__name__}.{key}", hints[key], value) for key, value in values.items()})


def _coerce(name: str, hint: Any, value: Any) -> Any:
    """Turn JSON or text into the annotated type: a scalar, a literal, a tuple of either, or one of these or None."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        return _first_that_fits(name, [a for a in arguments if a is not NoneType], value)
    if origin is Literal:
        if value not in arguments:
            raise unknown(f"value of {name}", str(value), map(str, arguments))
        return value
    if origin is tuple:
        items = _items(value)
        kinds = arguments[:1] * len(items) if arguments[1:] == (...,) else arguments
        if len(items) != len(kinds):
            raise InterpError(f"{name}={value!r} needs {len(kinds)} values, got {len(items)}")
        return tuple(_coerce(name, each, item) for each, item in zip(kinds, items, strict=True))
    return _scalar(name, hint, value)


def _first_that_fits(name: str, kinds: list[Any], value: Any) -> Any:
    for kind in kinds[:-1]:
        try:
            return _coerce(name, kind, value)
        except InterpError:
            continue
    return _coerce(name, kinds[-1], value)


def _items(value: Any) -> list[Any]:
    """The members of a tuple: a list as it is, text split at commas, one scalar alone."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, list | tuple) else [value]


def _scalar(name: str, kind: Any, value: Any) -> Any:
    """One bool, int, float or str; nothing is rounded and nothing but text becomes text from a container."""
    wrong = InterpError(f"{name}={value!r} is not a {getattr(kind, '__name__', kind)}")
    if kind not in (bool, int, float, str):
        return value
    if value is None or isinstance(value, list | tuple | dict):
        raise wrong
    if kind is bool:
        words = {
            "true": True,
            "1": True,
            "yes": True,
            "on": True,
            "false": False,
            "0": False,
            "no": False,
            "off": False,
        }
        if str(value).lower() not in words:
            raise wrong
        return words[str(value).lower()]
    if kind is str:
        return str(value)
    try:
        made = float(value) if kind is float else int(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise wrong from error
    rounded = isinstance(value, float) and made != value
    if isinstance(value, bool) or rounded or not math.isfinite(made):
        raise wrong
    return made
