"""Progress of a training run: a live table on a terminal, a line now and then elsewhere, wandb where asked for."""

from __future__ import annotations

import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from interp.core.errors import MissingPackageError

if TYPE_CHECKING:
    from interp.dictionaries.training.watch import Tick, Watcher

LINE_SECONDS = 15.0
"""Between lines in a log file."""


@contextmanager
def watching() -> Generator[Watcher, None, None]:
    """A watcher for stderr."""
    from interp.cli import console

    terminal = console.err()
    if terminal.is_terminal:
        with _live(terminal) as watcher:
            yield watcher
        return
    yield _lines()


def _lines() -> Watcher:
    from interp.dictionaries.training.watch import Throttle

    due = Throttle(LINE_SECONDS)

    def watch(tick: Tick) -> None:
        if not due(tick):
            return
        for name, loss, fvu, l0, dead in tick.table():
            sys.stderr.write(
                f"{tick.headline()}  {name}: loss {loss}, FVU {fvu}, L0 {l0}, dead {dead} ({tick.seconds:.1f} s)\n"
            )
        sys.stderr.flush()

    return watch


@contextmanager
def _live(terminal: Any) -> Generator[Watcher, None, None]:
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    from interp.dictionaries.training.watch import COLUMNS, Throttle

    due = Throttle(0.2)
    with Live(console=terminal, auto_refresh=False) as live:

        def watch(tick: Tick) -> None:
            if not due(tick):
                return
            table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
            for column in COLUMNS:
                table.add_column(column, justify="left" if column == "job" else "right", overflow="fold")
            for row in tick.table():
                table.add_row(*map(Text, row))
            bar = ProgressBar(total=tick.n_steps, completed=tick.done, width=40)
            live.update(Group(Text(tick.headline()), bar, table), refresh=True)

        yield watch


class WandbWatch:
    """Rows to a project of Weights & Biases."""

    def __init__(self, project: str, config: Mapping[str, Any], every: int) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise MissingPackageError("--wandb needs the package: pip install wandb") from error
        run: Any = wandb.init(project=project, config=dict(config))  # pyright: ignore[reportUnknownMemberType]
        self._run, self._every = run, every

    def __call__(self, tick: Tick) -> None:
        if (tick.done - 1) % self._every and tick.done < tick.n_steps:
            return
        values = {f"{job}/{name}": value for job, row in tick.rows.items() for name, value in row.items()}
        self._run.log({**values, "tokens_per_second": tick.tokens_per_second}, step=tick.done)

    def close(self) -> None:
        self._run.finish()


def close_all(watchers: Sequence[Any]) -> None:
    """End what needs an end."""
    for watcher in watchers:
        if hasattr(watcher, "close"):
            watcher.close()
