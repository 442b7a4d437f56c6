"""What the commands write: tables on stdout, progress on stderr, JSON alone on stdout when a script asks.

On a terminal every step has a bar; elsewhere it leaves one line when it is done, so that logs stay short.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from interp.core.errors import InterpError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


def out() -> Console:
    """The console for answers. A pipe gets wide lines, so that a table can be read by other programs."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 160
    return Console(file=sys.stdout, width=width, highlight=False, soft_wrap=False)


def err() -> Console:
    """The console for progress."""
    from rich.console import Console

    return Console(file=sys.stderr, highlight=False)


def emit_json(value: Any) -> None:
    """One JSON document on stdout. What is not finite has no word in JSON and becomes null."""
    sys.stdout.write(json.dumps(_finite(value), indent=2, allow_nan=False, default=str) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in cast("Sequence[Any]", value)]
    return value


def print_title(title: str) -> None:
    """A heading above a table; a table's own title would be folded to its width."""
    if title:
        line(f"\n{title}", "bold")


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = ()) -> None:
    """A table on stdout; texts are shown as they are written, never read as markup."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    print_title(title)
    made = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, show_header=any(columns))
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    out().print(made)


def line(text: str, style: str = "") -> None:
    """One line on stdout, as it is written."""
    from rich.text import Text

    out().print(Text(text, style=style), soft_wrap=True)


def verdict(passed: bool, words: tuple[str, str] = ("held", "FAILED")) -> Any:
    """A verdict in colour and in a word."""
    from rich.text import Text

    return Text(f"✓ {words[0]}", style="green") if passed else Text(f"✗ {words[1]}", style="bold red")


class Steps:
    """Progress of a command: steps with a count (from `track`) and steps without."""

    def __init__(self, bars: Progress | None) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._began: dict[str, float] = {}

    def listen(self, label: str, done: int, total: int) -> None:
        """A listener for `interp.core.progress.listening`."""
        if done == 0:
            self._began[label] = time.perf_counter()
        if self._bars is None:
            if done == total:
                self._say(f"{label}: {total} of {total}", self._began.get(label))
            return
        if done == 0 or label not in self._tasks:
            self._tasks[label] = self._bars.add_task(label, total=total or 1)
        self._bars.update(self._tasks[label], completed=done if total else 1)

    @contextmanager
    def step(self, label: str) -> Generator[None, None, None]:
        """A step whose length is not known beforehand."""
        began = time.perf_counter()
        task = self._bars.add_task(label, total=None) if self._bars is not None else None
        yield
        if self._bars is not None and task is not None:
            self._bars.update(task, total=1, completed=1)
        else:
            self._say(label, began)

    def _say(self, text: str, began: float | None) -> None:
        took = f" ({time.perf_counter() - began:.1f} s)" if began is not None else ""
        sys.stderr.write(f"{text}{took}\n")
        sys.stderr.flush()


@contextmanager
def progress() -> Generator[Steps, None, None]:
    """Show the progress of everything run inside, on stderr."""
    from interp.core.progress import listening

    console = err()
    if not console.is_terminal:
        steps = Steps(None)
        with listening(steps.listen):
            yield steps
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bars:
        steps = Steps(bars)
        with listening(steps.listen):
            yield steps


def check_json_is_possible(as_json: bool, **others: bool) -> None:
    """Refuse flags that make no sense beside `--json`."""
    for name, given in others.items():
        if as_json and given:
            raise InterpError(f"--json and --{name} exclude each other; drop one")
