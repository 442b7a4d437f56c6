"""Help as a reader sees it: nothing of it is taken for markup and lost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import typer
from rich.style import Style
from rich.text import Text

from interp.cli.app import app


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    yield " ".join(path), command
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, (*path, name))


@pytest.mark.parametrize(("name", "command"), list(commands(typer.main.get_command(app))))
def test_texts_in_brackets_are_styles_or_shown(name: str, command: Any) -> None:
    """`[default: what the file says]` is a style to rich, and disappears without a word; it needs a backslash."""
    for written in (command.help, *(getattr(parameter, "help", None) for parameter in command.params)):
        if written:
            for span in Text.from_markup(written).spans:
                Style.parse(str(span.style))  # raises for what is no style
