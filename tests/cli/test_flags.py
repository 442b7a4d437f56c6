"""Flags mirror configs: each field of each method has one, its help is the docstring below it, its value arrives."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from interp.cli.flags import flag_names, flag_rows, read_config
from interp.core.errors import InterpError
from interp.core.spec import discover

Cli = Callable[..., Any]
FIELDS = [(name, field.name) for name, spec in discover().items() for field in dataclasses.fields(spec.config)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Every:
    """One field of each type."""

    count: int = 3
    """How many."""
    rate: float = 0.5
    """How fast."""
    loud: bool = False
    """Whether
    it is said."""
    quiet: bool = True
    name: str = "a"
    """Which one."""
    parts: tuple[str, ...] = ("x", "y")
    """Of what."""
    depths: tuple[float, ...] = (0.5,)
    """Where."""
    layer: int | None = None
    """The layer, if any."""


def parsed(*tokens: str, sets: tuple[str, ...] = (), file: Path | None = None) -> Every:
    return read_config(Every, tokens, sets, file)


def docstring_below(kind: type[Any], field: str) -> str:
    """The first string after the field in the source, read with a regular expression."""
    found = re.search(rf'^ +{field}: [^\n]*\n +"""(.*?)"""', inspect.getsource(kind), re.DOTALL | re.MULTILINE)
    return " ".join(found[1].split()) if found else ""


@pytest.mark.parametrize(("method", "field"), FIELDS)
def test_every_field_has_a_flag_with_its_docstring(method: str, field: str) -> None:
    config = discover()[method].config
    flag = f"--{field.replace('_', '-')}"
    (row,) = [row for row in flag_rows(config) if row[0].split(" / ")[0] == flag]
    assert row[2] == docstring_below(config, field) != "", f"{method}.{field} has no docstring below it"
    assert flag in flag_names(config)


@pytest.mark.parametrize("method", discover())
def test_help_of_a_method_shows_them(cli: Cli, method: str) -> None:
    said = cli("run", method, "--help")
    assert said.status == 0 and said.err == ""
    spec = discover()[method]
    assert spec.question.split()[0] in said.out
    rows = {line.split()[0]: line for line in said.out.splitlines() if line.startswith("--")}
    for flag, _, about in flag_rows(spec.config):
        assert about.split()[0] in rows[flag.split()[0]]


@pytest.mark.parametrize(("method", "field"), FIELDS)
def test_every_value_arrives(method: str, field: str) -> None:
    kind = discover()[method].config
    before = getattr(kind(), field)
    other: dict[type, Callable[[Any], Any]] = {
        bool: lambda value: not value,
        int: lambda value: value + 1,
        float: lambda value: value + 0.25,
        str: lambda value: value + "x",
        tuple: lambda value: value[:1],
    }
    hint = get_type_hints(kind)[field]
    if get_origin(hint) is tuple and ... not in get_args(hint):  # of fixed length
        other[tuple] = lambda value: tuple(item + 1 for item in value)
    choices = get_args(hint) if isinstance(before, str) else ()
    value = next((c for c in choices if c != before), None) or other[type(before)](before)
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    flag = f"--{field.replace('_', '-')}"
    expected = dataclasses.replace(kind(), **{field: value})
    assert read_config(kind, (flag, text), (), None) == expected
    assert read_config(kind, (f"{flag}={text}",), (), None) == expected
    assert read_config(kind, (), (f"{field}={text}",), None) == expected


@pytest.mark.parametrize(
    ("tokens", "field", "value"),
    [
        (("--count", "-4"), "count", -4),
        (("--rate", "1e-3"), "rate", 1e-3),
        (("--rate", "2"), "rate", 2.0),
        (("--loud",), "loud", True),
        (("--loud", "no"), "loud", False),
        (("--loud=on",), "loud", True),
        (("--no-quiet",), "quiet", False),
        (("--name", "a b=c"), "name", "a b=c"),
        (("--name=",), "name", ""),
        (("--name", "12"), "name", "12"),
        (("--parts", "z"), "parts", ("z",)),
        (("--parts", "z, w"), "parts", ("z", "w")),
        (("--depths", "-0.4,0.2"), "depths", (-0.4, 0.2)),
        (("--layer", "7"), "layer", 7),
        (("--layer", "null"), "layer", None),
        (("--count", "1", "--count", "2"), "count", 2),
        (("--loud", "--count", "5"), "count", 5),
    ],
)
def test_how_values_are_written(tokens: tuple[str, ...], field: str, value: Any) -> None:
    found = getattr(parsed(*tokens), field)
    assert found == value and type(found) is type(value)


def test_docstrings_of_several_lines_and_none() -> None:
    about = {row[0].split()[0]: row for row in flag_rows(Every)}
    assert about["--loud"] == ("--loud / --no-loud", "False", "Whether it is said.")
    assert about["--quiet"][2] == ""
    assert about["--parts"][1] == "x,y"


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        (("--cuont", "3"), "unknown flag '--cuont'; nearest: --count"),
        (("--no-laud",), "unknown flag '--no-laud'; nearest: --no-loud"),
        (("--no-count",), "unknown flag '--no-count'; nearest: .*--count"),
        (("--modle", "x"), "unknown flag '--modle'; nearest: --model"),
        (("--count",), "--count needs a value; its default is 3"),
        (("--count", "--loud"), "--count needs a value"),
        (("--count", "three"), "Every.count='three' is not a int"),
        (("--count", "3.5"), "Every.count='3.5' is not a int"),
        (("--rate", "fast"), "Every.rate='fast' is not a float"),
        (("--rate", "nan"), "Every.rate='nan' is not a float"),
        (("--loud=maybe",), "Every.loud='maybe' is not a bool"),
        (("--depths", "0.1,deep"), "Every.depths='deep' is not a float"),
        (("--layer", "last"), "Every.layer='last' is not a int"),
        (("--layer", "["), r"Every.layer='\[' is not a int"),
        (("count",), "unexpected argument 'count'; options are written --name value"),
        (("-c", "3"), "unexpected argument '-c'"),
    ],
)
def test_wrong_flags(tokens: tuple[str, ...], reason: str) -> None:
    with pytest.raises(InterpError, match=reason):
        parsed(*tokens)


def test_later_wins(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("count: 10\nrate: 10\nloud: yes\nparts: [p, q]\nlayer: 2\nname: 5\n", encoding="utf-8")
    found = parsed("--count", "30", sets=("count=20", "rate=20"), file=file)
    assert found == Every(count=30, rate=20.0, loud=True, parts=("p", "q"), layer=2, name="5")
    assert parsed(sets=("count=1", "count=2")).count == 2


def test_dashes_and_underscores_are_the_same(tmp_path: Path) -> None:
    kind = discover()["massive"].config
    file = tmp_path / "my.yaml"
    file.write_text("n-sequences: 3\nn_draws: 4\n", encoding="utf-8")
    found = read_config(kind, ("--calibration_skip", "7"), (" calibration-skip = 5", "length=9"), file)
    assert found == kind(n_sequences=3, n_draws=4, calibration_skip=7, length=9)


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("# nothing\n", encoding="utf-8")
    assert parsed(file=file) == Every()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"cuont: 3\n", "unknown option of Every 'cuont'; nearest: count"),
        (b"count: [1, 2]\n", r"Every.count=\[1, 2\] is not a int"),
        (b"count: 1.5\n", "Every.count=1.5 is not a int"),
        (b"count: true\n", "Every.count=True is not a int"),
        (b"name: null\n", "Every.name=None is not a str"),
        (b"rate: .inf\n", "Every.rate=inf is not a float"),
        (b"count: [1\nrate: 2", "my.yaml is not YAML"),
        (b"\xff\xfe\xfa", "my.yaml is not YAML"),
        (b"- count\n- 3\n", "my.yaml holds a list, not a mapping"),
        (b"count", "my.yaml holds a str, not a mapping"),
        (b"!!python/object/apply:os.getcwd []\n", "my.yaml is not YAML"),
    ],
)
def test_wrong_files(tmp_path: Path, text: bytes, reason: str) -> None:
    file = tmp_path / "my.yaml"
    file.write_bytes(text)
    with pytest.raises(InterpError, match=reason):
        parsed(file=file)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InterpError, match="could not read .*none.yaml: No such file"):
        parsed(file=tmp_path / "none.yaml")
    with pytest.raises(InterpError, match="could not read .*: Is a directory"):
        parsed(file=tmp_path)


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ("count", "--set 'count' is not of the form key=value"),
        ("cuont=3", "unknown option of Every 'cuont'; nearest: count"),
        ("=3", "unknown option of Every ''"),
        ("count=x", "Every.count='x' is not a int"),
    ],
)
def test_wrong_sets(item: str, reason: str) -> None:
    with pytest.raises(InterpError, match=reason):
        parsed(sets=(item,))


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (("--ratioo", "2"), "unknown flag '--ratioo'; nearest: --ratio"),
        (("--length", "long"), "MassiveConfig.length='long' is not a int"),
        (("--set", "lenght=3"), "unknown option of MassiveConfig 'lenght'; nearest: length"),
        (("--config", "bad.yaml"), "bad.yaml is not YAML"),
        (("--config", "none.yaml"), "could not read none.yaml: No such file"),
    ],
)
def test_a_wrong_flag_is_refused_before_the_model_is_opened(
    cli: Cli, work: Path, argv: tuple[str, ...], reason: str
) -> None:
    (work / "bad.yaml").write_text("a: [1\nb: {", encoding="utf-8")
    said = cli("run", "massive", "--model", "no-such-model", *argv)
    assert reason in said.reason and said.err.count("\n") == 1


def test_the_whole_line(cli: Cli, work: Path) -> None:
    (work / "my.yaml").write_text("length: 12\nn_draws: 3\nn_sequences: 4\n", encoding="utf-8")
    line = ("--config", "my.yaml", "--set", "n_draws=2", "--set", "n-sequences=3", "--n-sequences", "2")
    assert cli("run", "massive", "--model", "tiny-llama", *line, "--no-report", "--out", "here").status == 0
    manifest = json.loads((work / "here" / "manifest.json").read_text(encoding="utf-8"))
    config = manifest["results"][0]["manifest"]["config"]
    assert (config["length"], config["n_draws"], config["n_sequences"]) == (12, 2, 2)
