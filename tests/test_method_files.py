"""What the file of every method must look like, found by the scan: its docstring, its config, its last line."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json

import pytest

from interp.core.spec import Spec, build_config, discover

METHODS = discover()
MAX_FIELDS = 12

every_method = pytest.mark.parametrize("spec", METHODS.values(), ids=METHODS.keys())


@every_method
def test_config_is_frozen_small_and_explained(spec: Spec) -> None:
    config = spec.config()
    fields = dataclasses.fields(config)
    assert spec.config.__dataclass_params__.frozen
    assert all(field.kw_only for field in fields)
    assert len(fields) <= MAX_FIELDS
    body = ast.parse(inspect.getsource(spec.config)).body[0].body
    for here, below in zip(body, [*body[1:], None], strict=True):
        if isinstance(here, ast.AnnAssign):
            explained = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            assert explained, f"{spec.config.__name__}.{ast.unparse(here.target)} has no line of explanation below it"
    hash(config)
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    assert build_config(spec.config, plain) == config


@every_method
def test_file_opens_with_the_question_and_ends_with_the_spec(spec: Spec) -> None:
    module = inspect.getmodule(spec.run)
    assert module is not None
    assert module.__doc__
    opening = module.__doc__.strip().splitlines()
    assert "?" in opening[0] + opening[1], "the docstring opens with the question"
    assert len(opening) >= 4, "question, formula, paper and traps"
    statements = ast.parse(inspect.getsource(module)).body
    last = [node for node in statements if not isinstance(node, ast.Expr)][-1]
    assert isinstance(last, ast.Assign | ast.AnnAssign)
    assert ast.unparse(last).startswith("SPEC")
