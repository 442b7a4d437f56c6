"""Replay: run a saved result again and compare every headline number with it.

A number passes if |saved - fresh| <= absolute + relative * |saved|, with the method's tolerance for that key or
`DEFAULT_TOLERANCE`; integers, texts, booleans and the lengths of lists must be equal unless the method gives their key
a tolerance. Times are never compared. What differs between then and now (weights, data, versions, device, dtype,
threads) is named whether or not the numbers agree, because it is the first thing to look at when they do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from interp.core.manifest import Manifest
from interp.core.result import Result
from interp.core.spec import DEFAULT_TOLERANCE, Spec, Tolerance, build_config, find

EXACT = Tolerance()
ABSENT = "absent"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One headline number, then and now."""

    method: str
    key: str
    saved: Any
    fresh: Any
    within: bool
    allowed: str
    """The tolerance in words, or why nothing was compared."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Something about the circumstances that is not as it was."""

    method: str
    what: str
    saved: Any
    fresh: Any


def compare(saved: Result, fresh: Result, spec: Spec) -> list[Comparison]:
    """Every headline number and every control's verdict of a result against a recomputed one."""
    rows = compare_values(saved.method, saved.headline, fresh.headline, spec.tolerances)
    verdicts = {control.name: control.passed for control in fresh.controls}
    for control in saved.controls:
        now = verdicts.get(control.name, ABSENT)
        rows.append(
            Comparison(
                method=saved.method,
                key=f"control: {control.name}",
                saved=control.passed,
                fresh=now,
                within=now == control.passed,
                allowed="equal",
            )
        )
    return rows


def compare_values(
    method: str, saved: Mapping[str, Any], fresh: Mapping[str, Any], tolerances: Mapping[str, Tolerance]
) -> list[Comparison]:
    """The same for plain mappings; a key that is new is shown and does not fail."""
    rows: list[Comparison] = []
    for key in dict.fromkeys([*saved, *fresh]):
        then, now = saved.get(key, ABSENT), fresh.get(key, ABSENT)
        if is_time(key):
            within, allowed = True, "times are not compared"
        elif key not in saved:
            within, allowed = True, "new in this version"
        else:
            tolerance = tolerances.get(key)
            within, allowed = _agrees(then, now, tolerance), _words(then, tolerance)
        rows.append(Comparison(method=method, key=key, saved=then, fresh=now, within=within, allowed=allowed))
    return rows


def is_time(key: str) -> bool:
    """Whether the key holds a duration; those depend on the machine."""
    return key == "seconds" or key.startswith("seconds_") or key.endswith("_seconds")


def _agrees(saved: Any, fresh: Any, tolerance: Tolerance | None) -> bool:
    if isinstance(saved, bool) or isinstance(fresh, bool) or saved is None or fresh is None:
        return saved is fresh
    if isinstance(saved, Mapping) and isinstance(fresh, Mapping):
        then, now = cast("Mapping[Any, Any]", saved), cast("Mapping[Any, Any]", fresh)
        return set(then) == set(now) and all(_agrees(then[key], now[key], tolerance) for key in then)
    if isinstance(saved, (list, tuple)) and isinstance(fresh, (list, tuple)):
        before, after = cast("Sequence[Any]", saved), cast("Sequence[Any]", fresh)
        return len(before) == len(after) and all(_agrees(a, b, tolerance) for a, b in zip(before, after, strict=True))
    if isinstance(saved, (int, float)) and isinstance(fresh, (int, float)):
        return (tolerance or _default(saved)).allows(saved, fresh)
    return bool(saved == fresh)


def _default(value: float) -> Tolerance:
    """Whole numbers name things (a dim, a position, a count) and must be equal."""
    return DEFAULT_TOLERANCE if isinstance(value, float) else EXACT


def _words(saved: Any, tolerance: Tolerance | None) -> str:
    if tolerance is None and not _has_float(saved):
        return "equal"
    limit = tolerance or DEFAULT_TOLERANCE
    parts = [f"{limit.absolute:g}"] if limit.absolute else []
    parts += [f"{limit.relative:.3g} × saved"] if limit.relative else []
    return "± " + " + ".join(parts) if parts else "equal"


def _has_float(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_has_float(item) for item in cast("Mapping[Any, Any]", value).values())
    if isinstance(value, (list, tuple)):
        return any(_has_float(item) for item in cast("Sequence[Any]", value))
    return isinstance(value, float)


def differences(saved: Manifest, fresh: Manifest) -> list[Difference]:
    """What about model, data, config, versions and machine is not as it was."""
    pairs: list[tuple[str, Any, Any]] = []
    for name in ("weight_hash", "family", "dtype", "device", "attention"):
        pairs.append((f"model {name.replace('_', ' ')}", getattr(saved.model, name), getattr(fresh.model, name)))
    pairs += _pairs("data", saved.data, fresh.data)
    pairs += _pairs("config", saved.config, fresh.config)
    pairs += _pairs("metric", saved.metrics, fresh.metrics)
    pairs += _pairs("version of", saved.versions, fresh.versions)
    pairs += [("seeds", list(saved.seeds), list(fresh.seeds)), ("threads", saved.n_threads, fresh.n_threads)]
    pairs += [("code", saved.git, fresh.git)]
    return [
        Difference(method=saved.method, what=what, saved=then, fresh=now)
        for what, then, now in pairs
        if _plain(then) != _plain(now)
    ]


def _pairs(kind: str, saved: Mapping[str, Any], fresh: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    keys = dict.fromkeys([*saved, *fresh])
    return [(f"{kind} {key}", saved.get(key, ABSENT), fresh.get(key, ABSENT)) for key in keys]


def _plain(value: Any) -> Any:
    """Tuples and lists are the same thing once they have been JSON."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in cast("Sequence[Any]", value)]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    return value


def rerun(saved: Result, model: Any) -> Result:
    """Compute a saved result again from its manifest."""
    spec = find(saved.method)
    config = build_config(spec.config, saved.manifest.config)
    return spec.run(model, spec.load(model, config), config)
