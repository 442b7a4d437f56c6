"""The list of commands. Each group is one module; nothing heavy is imported before a command runs."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from interp.cli import bench, capture, circuit, demo, doctor, models, patch, run, runs, sae, tasks

HELP = """
[bold]interp[/bold]: open a model, find what happens inside, test the explanation, replay it.

[dim]Every run is a folder under runs/: its numbers (summary.json), its manifest,[/dim]
[dim]and report.html, one file that opens in any browser, offline.[/dim]
"""

EXAMPLES = """
 Examples
   interp demo                              four analyses of a real model
                                            the report: runs/demo/report.html
   interp sites smollm2-135m "gate.*"       points that can be read and edited
   interp verify smollm2-135m               does each hold what its name says?
   interp run massive --help                the flags of a method
   interp run massive --model smollm2-135m --n-sequences 6
   interp patch --task ioi --site resid_post,z --out runs/mine --json
   interp circuit find --task ioi           which edges carry a task, and controls
   interp replay runs/demo                  recompute and compare every number
   interp doctor                            what is missing, and how to fix it

 Exit status: 0 done, 1 the answer is no (verify, replay, doctor),
 2 bad input with a one-line reason on stderr.
"""


class Page(TyperGroup):
    """A group whose help ends with examples, with their lines as they are written."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        sys.stdout.write(EXAMPLES)


app = typer.Typer(
    name="interp",
    help=HELP,
    cls=Page,
    invoke_without_command=True,
    rich_markup_mode="rich",
    add_completion=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Show the help where no command is given."""
    if version:
        from interp.cli.console import line
        from interp.core.manifest import versions

        line(f"interp {versions().get('interp', 'from a checkout')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        context.command.format_help(context, context.make_formatter())
        raise typer.Exit


demo.register(app)
doctor.register(app)
models.register(app)
tasks.register(app)
run.register(app)
patch.register(app)
runs.register(app)
capture.register(app)
sae.register(app)
circuit.register(app)
bench.register(app)
