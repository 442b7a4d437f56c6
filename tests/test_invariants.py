"""What every method must keep, found by the scan: a new method is held to it without this file being touched.

Each runs its own SPEC example on tiny random models. Wall time (a headline with `seconds` in its name) is the one
number that may differ between runs.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from interp.core.errors import InterpError
from interp.core.hash import hash_bytes, hash_tensors
from interp.core.result import Result
from interp.core.run import Run, load_run, save_run
from interp.core.spec import METHOD_PACKAGES, Spec, build_config, discover
from interp.instrument.edits import Edit, add, edited, scale
from interp.models.model import LoadedModel
from interp.models.tiny import tiny_model

METHODS = discover()
FAMILIES = ("llama", "gemma3", "gpt2")
PASS_SIZES = {"ROWS": 1, "PER_PASS": 1, "TOKENS_PER_PASS": 16, "BLOCK": 7}
"""Module constants that say how much goes through at once, and a smaller value: it must not change a result."""

every_method = pytest.mark.parametrize("spec", METHODS.values(), ids=METHODS.keys())
every_family = pytest.mark.parametrize("family", FAMILIES)


def test_the_scan_finds_methods() -> None:
    """Guards the parametrised tests below against passing because there was nothing to run."""
    assert METHODS


def run_example(spec: Spec, model: LoadedModel) -> Result:
    data, config = spec.example(model)
    return spec.run(model, data, config)


def numbers(result: Result) -> dict[str, Any]:
    """The headline without wall time."""
    return {name: value for name, value in result.headline.items() if "seconds" not in name}


def hooks(model: LoadedModel) -> dict[str, tuple[list[int], ...]]:
    """Identity of every hook on every module."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        name: tuple([id(hook) for hook in getattr(module, kind).values()] for kind in kinds)
        for name, module in model.module.named_modules()
    }


def state(model: LoadedModel) -> dict[str, Any]:
    """Everything a method could leave changed on a model."""
    module = model.module
    return {
        "hooks": hooks(model),
        "forward": {n: m.__dict__.get("forward") for n, m in module.named_modules()},
        "training": {n: m.training for n, m in module.named_modules()},
        "weights": hash_tensors(module.state_dict()),
        "gradients": {n: (p.requires_grad, p.grad is None) for n, p in module.named_parameters()},
        "config": module.config.to_json_string(use_diff=False),
        "attention": module.config._attn_implementation,
    }


def logits(model: LoadedModel) -> torch.Tensor:
    ids = torch.arange(24).reshape(2, 12) + 40
    return model(ids)


def draws() -> tuple[str, str]:
    """State of the global generators. Python's own is left out: the type checker of the tests draws from it."""
    legacy = np.random.get_state(legacy=True)
    assert isinstance(legacy, tuple)
    return hash_tensors({"t": torch.get_rng_state()}), hash_bytes(legacy[1].tobytes(), str(legacy[2]).encode())


def pieces(value: Any, name: str = "data") -> Iterator[tuple[str, str]]:
    """The tensors, arrays, tables and plain values that some input consists of."""
    if isinstance(value, torch.Tensor):
        yield name, hash_tensors({"x": value})
    elif isinstance(value, np.ndarray):
        yield name, hash_bytes(value.tobytes())
    elif isinstance(value, pd.DataFrame):
        yield name, value.to_json()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from pieces(getattr(value, field.name), f"{name}.{field.name}")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from pieces(item, f"{name}[{key}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from pieces(item, f"{name}[{index}]")
    elif isinstance(value, str | int | float | None):
        yield name, repr(value)


@every_family
@every_method
def test_leaves_no_trace(spec: Spec, family: str) -> None:
    model = tiny_model(family)
    seen = []
    foreign = model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    before, expected, chance = state(model), logits(model), draws()
    data, config = spec.example(model)
    given = dict(pieces(data))
    called = len(seen)
    spec.run(model, data, config)
    assert state(model) == before
    assert torch.equal(logits(model), expected)
    assert draws() == chance, "a method drew from a global generator"
    assert dict(pieces(data)) == given, "a method changed its input"
    assert len(seen) > called, "the hook of somebody else did not fire"
    foreign.remove()


class Planted(Exception):
    """What the test throws; a method may not turn it into a result."""


@every_family
@every_method
def test_leaves_no_trace_when_it_fails(spec: Spec, family: str) -> None:
    """The first block raises at the first, the middle and the last of its calls."""
    model = tiny_model(family)
    data, config = spec.example(model)
    calls, fail_at = 0, 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise Planted

    expected = logits(model)
    handle = model.layers[0].register_forward_pre_hook(count)
    before = state(model)
    spec.run(model, data, config)
    total = calls
    assert total > 0
    for fail_at in sorted({1, (total + 1) // 2, total}):
        calls = 0
        with pytest.raises(Planted):
            spec.run(model, data, config)
        assert state(model) == before, f"after a failure at call {fail_at} of {total}"
    handle.remove()
    assert torch.equal(logits(model), expected)


@every_family
@every_method
def test_comes_out_the_same_again(spec: Spec, family: str) -> None:
    first, second = (run_example(spec, tiny_model(family)) for _ in range(2))
    assert numbers(first) == numbers(second)
    for name, table in first.tables.items():
        timed = [column for column in table if "seconds" in str(column)]
        pd.testing.assert_frame_equal(table.drop(columns=timed), second.tables[name].drop(columns=timed))
    for name, labelled in first.tensors.items():
        assert torch.equal(labelled.values.nan_to_num(), second.tensors[name].values.nan_to_num()), name


@every_method
def test_says_where_it_came_from(spec: Spec) -> None:
    model = tiny_model()
    data, config = spec.example(model)
    result = spec.run(model, data, config)
    manifest = result.manifest
    assert manifest.method == spec.name
    assert manifest.model == model.record()
    assert manifest.data["hash"]
    assert manifest.metrics == spec.metrics
    assert build_config(spec.config, json.loads(json.dumps(manifest.config))) == config
    for site in manifest.sites:
        assert model.resolve(site)
    assert set(spec.tolerances) <= set(result.headline), "a tolerance for a number that is not in the headline"
    assert result.panels
    assert all(panel.reading for panel in result.panels), "a figure without how to read it"


@every_family
@every_method
def test_survives_the_disk(spec: Spec, family: str, tmp_path: Path) -> None:
    result = run_example(spec, tiny_model(family))
    loaded = load_run(save_run(tmp_path / "run", Run(results=(result,), facts={}))).results[0]
    assert json.loads(json.dumps(result.headline)) == loaded.headline
    assert loaded.controls == result.controls
    assert loaded.panels == result.panels
    assert loaded.notes == result.notes
    for name, table in result.tables.items():
        assert table.index.names == [None], f"the row labels of {name} are not saved; make them a column"
        pd.testing.assert_frame_equal(loaded.tables[name], table.reset_index(drop=True), check_dtype=False)
    for name, labelled in result.tensors.items():
        assert torch.equal(loaded.tensors[name].values.nan_to_num(), labelled.values.nan_to_num())


def run_inside(spec: Spec, model: LoadedModel, edits: list[Edit]) -> dict[str, Any] | None:
    """The headline of a run with edits around it; None from a method that refuses, and says that an edit is open."""
    try:
        with edited(model, edits):
            return numbers(run_example(spec, model))
    except InterpError as error:
        if "edit of this model is open" not in str(error):
            raise
    return None


@every_family
@every_method
def test_edits_around_a_method_are_seen_or_refused(spec: Spec, family: str) -> None:
    """Adding zero, or doubling then halving, is equal to the last bit; a real edit is not."""
    model = tiny_model(family)
    expected = numbers(run_example(spec, model))
    middle = model.n_layers // 2
    nothing = [add(f"resid_post.{middle}", 0.0), add(f"mlp_out.{middle}", 0.0), add(f"z.{middle}", 0.0)]
    there_and_back = [scale(f"resid_post.{middle}", 2.0), scale(f"resid_post.{middle}", 0.5)]
    assert run_inside(spec, model, nothing) in (expected, None)
    assert run_inside(spec, model, there_and_back) in (expected, None)
    assert run_inside(spec, model, [add("resid_post.0", torch.linspace(-3, 3, 32))]) != expected
    assert numbers(run_example(spec, model)) == expected


def close(a: Any, b: Any, rel: float) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return a == pytest.approx(b, rel=rel, abs=rel)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(close(x, y, rel) for x, y in zip(a, b, strict=True))
    if isinstance(a, Mapping):
        return set(a) == set(b) and all(close(a[key], b[key], rel) for key in a)
    return a == b


def pass_sizes() -> list[tuple[str, str]]:
    """Module and name of each pass size that the methods and what they stand on declare."""
    layers = (*METHOD_PACKAGES, "interp.dictionaries", "interp.tasks")
    return [
        (module, name)
        for module in sorted(sys.modules)
        if module.startswith(layers)
        for name in PASS_SIZES
        if isinstance(vars(sys.modules[module]).get(name), int)
    ]


@every_method
def test_the_size_of_a_pass_does_not_matter(spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = numbers(run_example(spec, tiny_model()))
    assert pass_sizes()
    for module, name in pass_sizes():
        monkeypatch.setattr(f"{module}.{name}", PASS_SIZES[name])
    split = numbers(run_example(spec, tiny_model()))
    assert {k: (v, split[k]) for k, v in expected.items() if not close(v, split[k], 1e-3)} == {}


@every_family
@every_method
def test_double_precision_agrees(spec: Spec, family: str) -> None:
    single = numbers(run_example(spec, tiny_model(family)))
    double = numbers(run_example(spec, tiny_model(family, dtype=torch.float64)))
    assert {k: (v, double[k]) for k, v in single.items() if not close(v, double[k], 2e-3)} == {}


@every_method
def test_loads_what_its_config_names(spec: Spec) -> None:
    """Replay rebuilds the input from the config alone and gets the same one, or a reason that names the input.

    A reason is for a tiny model whose byte tokenizer cannot write the input, e.g. names of one token each.
    """
    model, config = tiny_model(), spec.config()
    try:
        first = dict(pieces(spec.load(model, config)))
    except InterpError as error:
        assert "tokenizer" in str(error), error  # noqa: PT017
        return
    assert first
    assert dict(pieces(spec.load(model, config))) == first
