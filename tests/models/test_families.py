"""Tiny models of every family, small networks of every block: captured, edited, differentiated, generated with.

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
from tests.models import conformance, test_blocks, test_cells

RECORD = Path(__file__).with_name("families.json")
BLOCKS = {f"{name} (block)": (module, name) for module in (test_cells, test_blocks) for name in module.CASES}
NAMES = [*tiny_names(), *BLOCKS]
CHECKS = ("capture", "edit", "gradient", "generation")
EXCEPTIONS: dict[tuple[str, str], str] = {
    (name, "generation"): "it classifies images"
    for family in families().values()
    for name in family.tiny
    if family.inputs == "pixels"
}
EXCEPTIONS |= {(name, "generation"): "it is no language model" for name in BLOCKS}
"""(tiny model, check) -> why it cannot pass; the test then demands that it still does not."""


def outcome(name: str, what: str) -> str:
    """`54` sites passed, or why not."""
    check = getattr(conformance, f"check_{what}")
    if name in BLOCKS:
        module, case = BLOCKS[name]
        return str(check(*module.opened(case, torch.float64 if what == "gradient" else torch.float32)).passed)
    sizes = {"n_layers": 2, "dtype": torch.float64} if what == "gradient" else {}
    return str(check(tiny_model(name, **sizes)).passed)


def recorded() -> dict[str, dict[str, str]]:
    return json.loads(RECORD.read_text(encoding="utf-8"))


@pytest.mark.filterwarnings("ignore:LSTM with projections")
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
    """The README's table: how many sites of each model passed; a dash where a network has no such thing."""
    rows = [
        f"| {name} | {' | '.join('–' if found[what].startswith('no: it ') else found[what] for what in CHECKS)} |"
        for name, found in sorted(recorded().items(), key=lambda item: (item[0] in BLOCKS, item[0].lower()))
    ]
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
