"""What a run says while it goes: a `Tick` after each step, for whoever watches.

    train(jobs, source, folder, watchers=[NotebookWatch()])

A watcher is a function of a tick; it is called after every step and decides itself how often it draws. The terminal's
is in the command line, a notebook's is here. Nobody has to watch: the log has it all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from interp.core.errors import MissingPackageError

COLUMNS = ("job", "loss", "FVU", "L0", "dead")
Row = Mapping[str, float | int]


@dataclass(frozen=True, kw_only=True)
class Tick:
    """Where a run is after a step."""

    done: int
    n_steps: int
    rows: Mapping[str, Row]
    """Job -> its row of the training curve; jobs that have ended are not there."""
    tokens_per_second: float
    """Tokens of the run so far over its time so far, all processes together."""
    seconds: float
    """Since this process began or went on."""
    seconds_left: float

    def headline(self) -> str:
        """One line on how far it is."""
        return (
            f"step {self.done:,} of {self.n_steps:,}  {self.tokens_per_second:,.0f} tokens/s  "
            f"ETA {duration(self.seconds_left)}"
        )

    def table(self) -> list[tuple[str, ...]]:
        """A row per job, under `COLUMNS`."""
        return [
            (name, f"{row['loss']:.4g}", f"{row['fvu']:.4f}", f"{row['l0']:.1f}", f"{row['dead_fraction']:.1%}")
            for name, row in self.rows.items()
        ]


Watcher = Callable[[Tick], None]


def duration(seconds: float) -> str:
    """As 3:07 or 2:03:07."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Throttle:
    """Says yes at most every so many seconds, and always for the last step."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._next = seconds, 0.0

    def __call__(self, tick: Tick) -> bool:
        now = time.monotonic()
        if now < self._next and tick.done < tick.n_steps:
            return False
        self._next = now + self.seconds
        return True


class NotebookWatch:
    """A table in the output of the cell, drawn again as the run goes on."""

    def __init__(self, seconds: float = 0.5) -> None:
        try:
            from IPython.display import display
        except ImportError as error:
            raise MissingPackageError("watching in a notebook needs IPython: pip install jupyterlab") from error
        self._display, self._due, self._handle = display, Throttle(seconds), None

    def __call__(self, tick: Tick) -> None:
        if not self._due(tick):
            return
        from IPython.display import HTML

        made: Any = HTML(as_html(tick))
        if self._handle is None:
            self._handle = self._display(made, display_id=True)
        else:
            self._handle.update(made)


def as_html(tick: Tick) -> str:
    """A bar and a table."""
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in tick.table())
    bar = f'<progress value="{tick.done}" max="{tick.n_steps}"></progress>'
    return f"<div>{bar} {escape(tick.headline())}<table><tr>{head}</tr>{rows}</table></div>"
