"""`interp demo`: from a real gated model to a tested explanation, in one command.

Checks the model (`verify`), runs four methods with their default configs, saves one run and writes its report. What
the first run converted or captured is cached, so that a second one is quicker.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from interp.cli import console, options

if TYPE_CHECKING:
    from interp.core.run import Run

METHODS = ("massive", "patching", "sae", "steering")
OUT = Path("runs") / "demo"


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What the demo made."""

    run: Run
    folder: Path
    report: Path


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Start here")(demo)


def demo(
    model: options.Model = options.DEFAULT_MODEL,
    out: options.Out = None,
    as_json: options.Json = False,
) -> None:
    """Four analyses of a real model, with controls; a few minutes on two cores. The report: runs/demo/report.html."""
    with console.progress() as steps:
        made = run_demo(model, out or OUT, steps)
    if as_json:
        console.emit_json(
            {"run": made.folder.as_posix(), "report": made.report.as_posix(), "summary": made.run.summary}
        )
        return
    print_demo(made)


def run_demo(
    model_name: str,
    out: Path,
    steps: console.Steps,
    *,
    methods: Sequence[str] = METHODS,
    configs: Mapping[str, Mapping[str, Any]] | None = None,
) -> Demo:
    """Verify, run the methods, save, report. `configs` overrides fields of the methods' default configs."""
    from interp.core.run import Run, save_run
    from interp.core.spec import build_config, find
    from interp.models.probe import verify
    from interp.report.html import write_report

    specs = [find(name) for name in methods]
    made = [build_config(spec.config, (configs or {}).get(spec.name, {})) for spec in specs]
    options.check_out(out)
    began = time.perf_counter()
    with steps.step(f"opening {model_name}"):
        model = options.open_model(model_name, check=False)
    with steps.step("verifying every site"):
        probe = verify(model)
    results = []
    for spec, config in zip(specs, made, strict=True):
        with steps.step(f"{spec.name}: reading the input"):
            data = spec.load(model, config)
        results.append(spec.run(model, data, config))
    failure = probe.first_failure
    facts = {
        "verify": {
            "max_abs_diff": probe.max_abs_diff,
            "passed": probe.passed,
            "n_sites": probe.n_sites,
            "n_checks": len(probe.checks),
            "first_failure": None if failure is None else f"{failure.name} at {failure.site}",
        },
        "seconds": round(time.perf_counter() - began, 3),
    }
    run = Run(results=tuple(results), facts=facts)
    with steps.step("writing the run and its report"):
        save_run(out, run)
        report = write_report(out)
    return Demo(run=run, folder=out, report=report)


def print_demo(made: Demo) -> None:
    """A short table, then where to look."""
    from interp.report.tables import shown

    rows: list[tuple[Any, ...]] = []
    facts = made.run.facts["verify"]
    words = f"{facts['n_checks']} checks at {facts['n_sites']} sites, max |logit difference| {facts['max_abs_diff']:g}"
    rows.append(("verify", words, console.verdict(facts["passed"])))
    for result in made.run.results:
        held = sum(control.passed for control in result.controls)
        headline = ", ".join(f"{key} {shown(value)}" for key, value in result.headline.items())
        share = f"{held} of {len(result.controls)}"
        verdict = console.verdict(held == len(result.controls), (share, share))
        rows.append((result.method, headline, verdict))
    console.table("", ("method", "headline", "controls held"), rows)
    console.line(f"{made.run.facts['seconds']:.0f} s. Open the report:")
    console.line(f"  {made.report.as_posix()}", "bold")
