"""Configs are built from plain values without guessing, and methods are found by a scan."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from interp.core.errors import InterpError
from interp.core.spec import DEFAULT_TOLERANCE, Spec, Tolerance, build_config, discover, find


@dataclass(frozen=True, kw_only=True)
class Config:
    k: int = 4
    rate: float = 0.5
    name: str = "docs"
    fast: bool = False
    layers: tuple[int, ...] = ()
    strengths: tuple[float, ...] = (1.0, 2.0)
    span: tuple[int, str] = (1, "a")
    limit: int | None = None
    either: int | str = 3
    mode: Literal["exact", "fast"] = "exact"


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ({}, {}),
        ({"k": 8}, {"k": 8}),
        ({"k": "8"}, {"k": 8}),
        ({"k": 8.0}, {"k": 8}),
        ({"k": 2**62 + 1}, {"k": 2**62 + 1}),
        ({"rate": 2}, {"rate": 2.0}),
        ({"rate": "1e-3"}, {"rate": 0.001}),
        ({"name": 7}, {"name": "7"}),
        ({"name": "a,b"}, {"name": "a,b"}),
        ({"fast": True}, {"fast": True}),
        ({"fast": "yes"}, {"fast": True}),
        ({"fast": "False"}, {"fast": False}),
        ({"fast": 0}, {"fast": False}),
        ({"layers": "1, 2,3"}, {"layers": (1, 2, 3)}),
        ({"layers": [1, 2]}, {"layers": (1, 2)}),
        ({"layers": 5}, {"layers": (5,)}),
        ({"layers": ""}, {"layers": ()}),
        ({"strengths": [1, "2"]}, {"strengths": (1.0, 2.0)}),
        ({"span": "3,b"}, {"span": (3, "b")}),
        ({"limit": None}, {"limit": None}),
        ({"limit": "9"}, {"limit": 9}),
        ({"either": "9"}, {"either": 9}),
        ({"either": "nine"}, {"either": "nine"}),
        ({"mode": "fast"}, {"mode": "fast"}),
    ],
)
def test_coercion(given: dict[str, Any], made: dict[str, Any]) -> None:
    config = build_config(Config, given)
    assert config == dataclasses.replace(Config(), **made)
    for field, value in made.items():
        assert type(getattr(config, field)) is type(value)


def test_defaults_of_a_frozen_config_are_not_touched() -> None:
    build_config(Config, {"k": 9})
    assert Config().k == 4


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"kk": 1}, "unknown option of Config 'kk'; nearest: k"),
        ({"k": "many"}, "Config.k='many' is not a int"),
        ({"k": 3.7}, "Config.k=3.7"),
        ({"k": "3.7"}, "Config.k='3.7'"),
        ({"k": True}, "Config.k=True"),
        ({"k": None}, "Config.k=None"),
        ({"k": [1]}, "Config.k="),
        ({"rate": "nan"}, "Config.rate='nan'"),
        ({"rate": float("inf")}, "Config.rate=inf"),
        ({"name": ["a"]}, "Config.name="),
        ({"fast": "maybe"}, "Config.fast='maybe'"),
        ({"fast": 2}, "Config.fast=2"),
        ({"layers": "1,x"}, "Config.layers='x'"),
        ({"layers": [1, None]}, "Config.layers=None"),
        ({"span": "3"}, "needs 2 values, got 1"),
        ({"limit": "none at all"}, "Config.limit"),
        ({"mode": "exakt"}, "'exakt'; nearest: exact"),
    ],
)
def test_wrong_values_are_named(given: dict[str, Any], says: str) -> None:
    with pytest.raises(InterpError, match=says.replace("[", r"\[")):
        build_config(Config, given)


def test_tolerance() -> None:
    assert Tolerance().allows(1.0, 1.0)
    assert not Tolerance().allows(1.0, 1.0 + 1e-9)
    assert Tolerance(relative=0.1).allows(-10.0, -10.9)
    assert not Tolerance(relative=0.1).allows(-10.0, -11.1)
    assert Tolerance(absolute=0.5).allows(0.0, 0.5)
    assert not DEFAULT_TOLERANCE.allows(1.0, float("nan"))


def test_every_discovered_method_is_described() -> None:
    methods = discover()
    assert list(methods) == sorted(methods)
    for name, spec in methods.items():
        assert isinstance(spec, Spec)
        assert spec.name == name
        assert spec.question.strip(), name
        assert "http" in spec.paper, name
        assert spec.metrics, name
        assert find(name) is spec


def test_unknown_method() -> None:
    with pytest.raises(InterpError, match="method 'no such thing'"):
        find("no such thing")
