"""Errors that name the value, what was expected, and the next step.

Every error a user can cause is an `InterpError`; the command line turns it into one line and exit status 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InterpError(ValueError):
    """Bad input: the message says which value, what was expected and what to do next."""


class SiteError(InterpError):
    """A site that does not exist, or that this model does not have."""


class NeverFiredError(InterpError):
    """A site was asked for and its module never ran."""


class ArtefactError(InterpError):
    """A file or folder is missing, corrupt, foreign or unsafe to read."""


class MissingPackageError(InterpError):
    """An optional package is not installed; the message carries the exact command."""


def nearest(value: str, choices: Iterable[str], n: int = 3) -> list[str]:
    """The `n` choices that look most like `value`, best first; never empty unless `choices` is."""
    known = sorted(set(choices))
    close = difflib.get_close_matches(value, known, n=n, cutoff=0.4)
    return close or known[:n]


def unknown(kind: str, value: str, choices: Iterable[str], *, error: type[InterpError] = InterpError) -> InterpError:
    """An error for an unknown name, with the nearest valid ones."""
    known = list(choices)
    if not known:
        return error(f"unknown {kind} {value!r}; there are none to choose from")
    return error(f"unknown {kind} {value!r}; nearest: {', '.join(nearest(value, known))}")
