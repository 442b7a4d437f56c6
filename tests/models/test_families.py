"""Every family's tiny model: captured, edited, differentiated, generated with.

The outcome of each is kept in `families.json`, from which the README's matrix is made: a test fails if what it finds is
not what is written there. `python -m tests.models.test_families [NAME ...]` runs them and writes the file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from interp.core.errors import InterpError
from interp.models.families import families
from interp.models.tiny import tiny_model, tiny_names
from tests.models import conformance

RECORD = Path(__file__).with_name("families.json")
NAMES = tiny_names()
CHECKS = ("capture", "edit", "gradient", "generation")
EXCEPTIONS: dict[tuple[str, str], str] = {
    (name, "generation"): "it classifies images"
    for family in families().values()
    for name in family.tiny
    if family.inputs == "pixels"
}
"""(tiny model, check) -> why it cannot pass; the test then demands that it still does not."""


def outcome(name: str, what: str) -> str:
    """`54` sites passed, or why not."""
    sizes = {"n_layers": 2, "dtype": torch.float64} if what == "gradient" else {}
    found = getattr(conformance, f"check_{what}")(tiny_model(name, **sizes))
    return str(found.passed)


def recorded() -> dict[str, dict[str, str]]:
    return json.loads(RECORD.read_text(encoding="utf-8"))


@pytest.mark.parametrize("what", CHECKS)
@pytest.mark.parametrize("name", NAMES)
def test_family(name: str, what: str) -> None:
    reason = EXCEPTIONS.get((name, what))
    if reason is None:
        assert outcome(name, what) == recorded()[name][what], "python -m tests.models.test_families writes the record"
        return
    with pytest.raises((AssertionError, InterpError, RuntimeError, TypeError, AttributeError)):
        outcome(name, what)
    assert recorded()[name][what] == f"no: {reason}"


def test_the_record_has_no_family_that_is_gone() -> None:
    assert sorted(recorded()) == sorted(NAMES)


def matrix() -> str:
    """The README's table: how many sites of each family's tiny model passed."""
    rows = [f"| {name} | {' | '.join(found[what] for what in CHECKS)} |" for name, found in sorted(recorded().items())]
    return "\n".join(["| model | capture | edit | gradient | generation |", "|---|---|---|---|---|", *rows])


def write(names: list[str]) -> None:
    record = {name: found for name, found in (recorded() if RECORD.exists() else {}).items() if name in NAMES}
    for name in names or NAMES:
        record[name] = {
            what: f"no: {EXCEPTIONS[name, what]}" if (name, what) in EXCEPTIONS else outcome(name, what)
            for what in CHECKS
        }
        RECORD.write_text(json.dumps(dict(sorted(record.items())), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(sys.argv[1:])
