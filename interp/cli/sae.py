"""The group `interp sae`: train a dictionary, judge it, look at it, convert it, check its health."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

import typer

from interp.cli import sae_train
from interp.cli.run import PANEL, PASS_ON

OTHERS = (
    ("eval", "sae_eval", "evaluate"),
    ("pages", "sae_pages", "pages"),
    ("convert", "sae_convert", "convert"),
    ("health", "sae_health", "health"),
)
"""Command, module of `interp.cli`, function."""


def register(app: typer.Typer) -> None:
    """Add the group, and `plan sae`; comes after `capture`, which makes the group `plan`."""
    group = typer.Typer(help="Sparse dictionaries: train, judge, look at, convert, check.", no_args_is_help=True)
    _command(group, "train", sae_train.train)
    for name, module, function in OTHERS:
        if find_spec(f"interp.cli.{module}") is not None:
            group.command(name)(getattr(importlib.import_module(f"interp.cli.{module}"), function))
    app.add_typer(group, name="sae", rich_help_panel=PANEL)
    plan = next(found.typer_instance for found in app.registered_groups if found.name == "plan")
    assert plan is not None
    _command(plan, "sae", sae_train.plan)


def _command(app: typer.Typer, name: str, function: Any) -> None:
    """A command that parses flags of its own."""
    app.command(name, context_settings=PASS_ON, add_help_option=False)(function)
