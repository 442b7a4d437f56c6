"""`interp list`, `interp report`, `interp replay`: what was run, shown again, run again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from interp.cli import console, options
from interp.core.errors import InterpError

if TYPE_CHECKING:
    from interp.cli.replay import Comparison, Difference
    from interp.core.run import Run

PANEL = "Come back to it"


def register(app: typer.Typer) -> None:
    app.command("list", rich_help_panel=PANEL)(list_runs)
    app.command("report", rich_help_panel=PANEL)(report)
    app.command("replay", rich_help_panel=PANEL)(replay)


def list_runs(
    folder: Annotated[Path, typer.Argument(help="Folder that holds runs.")] = Path("runs"),
    as_json: options.Json = False,
) -> None:
    """Runs, newest last, with what they found out about their own controls."""
    if not folder.is_dir():
        raise InterpError(f"no folder {folder.as_posix()!r} here; a first run makes it: interp demo")
    rows = [read_row(path.parent) for path in folder.glob("*/manifest.json")]
    rows.sort(key=lambda row: (row["created"], row["run"]))
    if as_json:
        console.emit_json({"runs": rows})
        return
    shown = [
        (row["run"], row["model"], ", ".join(row["methods"]), row["created"][:16].replace("T", " "), row["controls"],
         "yes" if row["report"] else "no")
        for row in rows
    ]  # fmt: skip
    console.table("", ("run", "model", "methods", "made (UTC)", "controls held", "report"), shown)


def read_row(folder: Path) -> dict[str, Any]:
    """One run from its manifest alone; a damaged one is listed as such."""
    row: dict[str, Any] = {"run": folder.as_posix(), "model": "", "methods": [], "created": "", "controls": "damaged",
                           "report": (folder / "report.html").is_file()}  # fmt: skip
    try:
        results = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["results"]
        passed = [control["passed"] for result in results for control in result["controls"]]
        manifests = [result["manifest"] for result in results]
        row |= {
            "model": ", ".join(dict.fromkeys(manifest["model"]["source"] for manifest in manifests)),
            "methods": [manifest["method"] for manifest in manifests],
            "created": max((manifest["created"] for manifest in manifests), default=""),
            "controls": f"{sum(passed)} of {len(passed)}",
        }
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return row


def report(folder: options.RunFolder, as_json: options.Json = False) -> None:
    """Write report.html of a run again: one file that opens offline."""
    from interp.report.html import write_report

    with console.progress() as steps, steps.step("writing the report"):
        path = write_report(options.find_run(folder))
    if as_json:
        console.emit_json({"report": path.as_posix(), "bytes": path.stat().st_size})
    else:
        console.line(path.as_posix())


def replay(
    folder: options.RunFolder,
    device: Annotated[str, typer.Option("--device", help="Where to recompute. \\[default: where it was]")] = "",
    as_json: options.Json = False,
) -> None:
    """Recompute a run and compare every number; exit status 1 if one is out of tolerance."""
    from interp.core.run import load_run

    path = options.find_run(folder)
    comparisons, changes = replay_run(load_run(path), device)
    held = all(row.within for row in comparisons)
    if as_json:
        console.emit_json(
            {
                "run": path.as_posix(),
                "replayed": held,
                "comparisons": [vars(row) for row in comparisons],
                "differences": [vars(row) for row in changes],
            }
        )
    else:
        _print_replay(path, comparisons, changes)
    if not held:
        raise typer.Exit(1)


def replay_run(run: Run, device: str = "") -> tuple[list[Comparison], list[Difference]]:
    """Run every result of a run again, one model load per model, and compare."""
    from interp.cli import replay as again
    from interp.core.spec import find
    from interp.models.probe import verify

    specs = [find(result.method) for result in run.results]
    comparisons, changes, models = list["Comparison"](), list["Difference"](), dict[tuple[str, ...], Any]()
    with console.progress() as steps:
        for result, spec in zip(run.results, specs, strict=True):
            record = result.manifest.model
            where = device or (record.device if record.device in options.devices() else "cpu")
            key = (record.source, where, record.dtype)
            if key not in models:
                with steps.step(f"opening {record.source}"):
                    models[key] = options.open_model(record.source, where, record.dtype)
                if not comparisons and "verify" in run.facts:
                    with steps.step("verifying every site"):
                        fresh = {"max_abs_diff": verify(models[key]).max_abs_diff}
                    saved = {"max_abs_diff": run.facts["verify"]["max_abs_diff"]}
                    comparisons += again.compare_values("verify", saved, fresh, {"max_abs_diff": again.EXACT})
            fresh_result = again.rerun(result, models[key])
            comparisons += again.compare(result, fresh_result, spec)
            changes += again.differences(result.manifest, fresh_result.manifest)
    return comparisons, changes


def _print_replay(path: Path, comparisons: list[Comparison], changes: list[Difference]) -> None:
    from interp.report.tables import shown

    rows = [
        (
            row.method,
            row.key,
            shown(row.saved),
            shown(row.fresh),
            row.allowed,
            console.verdict(row.within, ("within", "OUT")),
        )
        for row in comparisons
    ]
    columns = ("method", "quantity", "saved", "now", "allowed", "")
    console.table(f"Replay of {path.as_posix()}", columns, rows, right=("saved", "now"))
    merged: dict[tuple[str, str, str], list[str]] = {}
    for change in changes:
        merged.setdefault((change.what, shown(change.saved), shown(change.fresh)), []).append(change.method)
    if merged:
        differing = [(what, then, now, ", ".join(methods)) for (what, then, now), methods in merged.items()]
        console.table("Not as it was", ("what", "saved", "now", "methods"), differing)
    else:
        console.line("Weights, data, config, versions, device, dtype and threads are as they were.")
    n_out = sum(not row.within for row in comparisons)
    if n_out:
        console.line(f"{n_out} of {len(comparisons)} numbers are out of tolerance.", "bold red")
    else:
        console.line(f"All {len(comparisons)} numbers are within tolerance.", "green")
