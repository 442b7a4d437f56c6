"""The command line: `interp COMMAND`, or `python -m interp.cli COMMAND`.

Exit status: 0 done, 1 the command ran and its answer is no (`verify`, `replay`, `doctor`), 2 bad input with a one-line
reason on stderr, 130 interrupted. An error that is nobody's input keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from interp.core.errors import InterpError, unknown

BAD_INPUT = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    import typer

    from interp.cli.app import app

    command: Any = typer.main.get_command(app)
    usage_error: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
    try:
        status = command.main(
            args=list(sys.argv[1:] if argv is None else argv), prog_name="interp", standalone_mode=False
        )
    except InterpError as error:
        return _refuse(str(error))
    except usage_error as error:
        return _refuse(_usage(error))
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except BrokenPipeError:
        # `interp sites MODEL | head` closed the pipe; give the interpreter's last flush somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if status == INTERRUPTED:  # typer itself turns Ctrl-C into this status, without a word
        sys.stderr.write("interp: interrupted\n")
    return status if isinstance(status, int) else 0


def _refuse(message: str) -> int:
    sys.stderr.write(f"interp: error: {' '.join(message.split())}\n")
    return BAD_INPUT


def _usage(error: Any) -> str:
    """The one line of a usage error, with the nearest valid flag or command."""
    context = getattr(error, "ctx", None)
    flag = getattr(error, "option_name", None)
    if context is not None and isinstance(flag, str):
        flags = [name for parameter in context.command.params for name in parameter.opts if name.startswith("--")]
        return str(unknown("flag", flag, flags))
    message = str(error.format_message()) or "name a command; they are listed above"
    group: Any = getattr(context, "command", None)
    if message.startswith("No such command") and hasattr(group, "commands"):
        return str(unknown("command", message.split("'")[1], group.commands))
    return message
