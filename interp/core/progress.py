"""Progress without a display: long loops say how far they are, and whoever wants to can show it.

Methods write `for x in track(items, "patching")`. The command line subscribes a progress bar, a notebook may
subscribe another; with nobody listening it costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

Item = TypeVar("Item")
Listener = Callable[[str, int, int], None]
"""Called with (label, done, total) after every step, and once with done = 0."""

_listener: ContextVar[Listener | None] = ContextVar("interp_progress", default=None)


@contextmanager
def listening(listener: Listener) -> Generator[None, None, None]:
    """Send the progress of everything run inside to `listener`."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def track(items: Sequence[Item], label: str) -> Iterator[Item]:
    """Iterate over `items`, telling the listener after each."""
    listener = _listener.get()
    total = len(items)
    if listener:
        listener(label, 0, total)
    for done, item in enumerate(items, 1):
        yield item
        if listener:
            listener(label, done, total)
