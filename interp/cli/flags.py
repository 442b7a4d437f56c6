"""Flags that mirror a config: `--n-sequences 6` sets the field `n_sequences` of the method's dataclass.

Later wins: defaults, then `--config FILE.yaml`, then `--set k=v`, then flags. An unknown name fails with the nearest
valid one, before any model is loaded. The help text of a flag is the docstring line below its field.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from interp.core.errors import ArtefactError, InterpError, unknown

WORDS = ("true", "false", "yes", "no", "on", "off", "1", "0")


def read_config(kind: type[Any], tokens: Sequence[str], sets: Sequence[str], file: Path | None) -> Any:
    """The config of a method from everything that was said on the command line."""
    from interp.core.spec import build_config

    values: dict[str, Any] = {}
    if file is not None:
        values |= read_yaml(file)
    for item in sets:
        key, equals, value = item.partition("=")
        if not equals:
            raise InterpError(f"--set {item!r} is not of the form key=value")
        values[key.strip().replace("-", "_")] = _scalar(kind, key.strip().replace("-", "_"), value)
    values |= parse_flags(kind, tokens)
    return build_config(kind, values)


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML file that holds one mapping of field names to values."""
    import yaml

    try:
        raw: object = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtefactError(f"could not read {file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ArtefactError(f"{file} is not YAML: {error}") from error
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ArtefactError(f"{file} holds a {type(raw).__name__}, not a mapping of option names to values")
    items = cast("dict[Any, Any]", raw).items()
    return {str(key).replace("-", "_"): value for key, value in items}


def parse_flags(kind: type[Any], tokens: Sequence[str]) -> dict[str, Any]:
    """`--field value`, `--field=value`, `--flag`, `--no-flag` as field values."""
    defaults, values, rest = kind(), dict[str, Any](), list(tokens)
    names = [field.name for field in dataclasses.fields(kind)]
    while rest:
        token = rest.pop(0)
        if not token.startswith("--"):
            raise InterpError(f"unexpected argument {token!r}; options are written --name value")
        text, equals, value = token[2:].partition("=")
        key = text.replace("-", "_")
        switch = key.removeprefix("no_")
        if key not in names and isinstance(getattr(defaults, switch, None), bool):
            values[switch] = False
        elif key not in names:
            raise unknown("flag", f"--{text}", flag_names(kind))
        elif equals:
            values[key] = _scalar(kind, key, value)
        elif isinstance(getattr(defaults, key), bool):
            values[key] = rest.pop(0) if rest and rest[0].lower() in WORDS else True
        elif not rest or rest[0].startswith("--"):
            raise InterpError(f"--{text} needs a value; its default is {getattr(defaults, key)!r}")
        else:
            values[key] = _scalar(kind, key, rest.pop(0))
    return values


def _scalar(kind: type[Any], key: str, text: str) -> Any:
    """Text for a field; where the default is None there is no type to follow, so the text is read as YAML."""
    import yaml

    if getattr(kind(), key, "") is not None:
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def flag_names(kind: type[Any]) -> list[str]:
    """Every flag of a config, and the flags that all methods share."""
    from interp.cli.options import SHARED

    defaults = kind()
    names: list[str] = []
    for field in dataclasses.fields(kind):
        flag = field.name.replace("_", "-")
        names += [f"--{flag}"] + ([f"--no-{flag}"] if isinstance(getattr(defaults, field.name), bool) else [])
    return [*names, *SHARED]


def field_docs(kind: type[Any]) -> Mapping[str, str]:
    """Field name -> the docstring line below it, read from the source; empty where the source is gone."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return {}
    body = cast("ast.ClassDef", tree.body[0]).body
    docs: dict[str, str] = {}
    for field, below in pairwise(body):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
            docs[field.target.id] = " ".join(below.value.value.split())
    return docs


def flag_rows(kind: type[Any]) -> list[tuple[str, str, str]]:
    """(flag, default, help) of every field, for `interp run METHOD --help`."""
    docs, defaults = field_docs(kind), kind()
    rows: list[tuple[str, str, str]] = []
    for field in dataclasses.fields(kind):
        value, flag = getattr(defaults, field.name), field.name.replace("_", "-")
        shown = f"--{flag} / --no-{flag}" if isinstance(value, bool) else f"--{flag}"
        text = ",".join(map(str, cast("tuple[Any, ...]", value))) if isinstance(value, tuple) else str(value)
        rows.append((shown, text, docs.get(field.name, "")))
    return rows
