"""`interp circuit`: find the circuit of a task, check it on new prompts, compare two, show one."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from interp.cli import console, options
from interp.cli.run import PANEL, method_command
from interp.core.errors import ArtefactError, InterpError

if TYPE_CHECKING:
    from interp.circuits.saved import SavedCircuit

LEVEL = 0.05
FORMATS = ("json", "dot", "graphml")


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="Circuits: find one, check it on new prompts, compare two, show it.", no_args_is_help=True)
    about = "Find the circuit of a task, with its faithfulness, controls and evidence (short for: run circuit)."
    method_command(group, "find", "circuit", about)
    group.command("check")(check)
    group.command("compare")(compare)
    group.command("show")(show)
    app.add_typer(group, name="circuit", rich_help_panel=PANEL)


def open_circuit(folder: Path) -> SavedCircuit:
    """The circuit of a run folder, by path or by name under runs/."""
    from interp.circuits.saved import saved_circuit
    from interp.core.run import load_run

    return saved_circuit(load_run(options.find_run(folder)))


def reopen_model(saved: SavedCircuit, device: str) -> Any:
    """The model of a run; another one under the same name is refused."""
    record = saved.result.manifest.model
    model = options.open_model(record.source, device, record.dtype)
    if model.weight_hash != record.weight_hash:
        raise ArtefactError(f"{record.source} has other weights now than when this circuit was found; find it again")
    return model


def config_of(saved: SavedCircuit) -> Any:
    from interp.circuits.find import CircuitConfig
    from interp.core.spec import build_config

    return build_config(CircuitConfig, saved.result.manifest.config)


def check(
    run: options.RunFolder,
    n_pairs: Annotated[int, typer.Option("--n-pairs", help="New prompt pairs of each split.")] = 32,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the new prompts and of the controls.")] = 1,
    n_random: Annotated[int, typer.Option("--n-random", help="Control circuits; 19 give p <= 0.05 at best.")] = 99,
    device: options.Device = "cpu",
    as_json: options.Json = False,
) -> None:
    """Is the circuit faithful on prompts it was not found on, and more so than circuits of the same degrees?"""
    if n_random < 19:
        raise InterpError(f"--n-random {n_random} cannot give p <= {LEVEL:g}; take at least 19")
    saved = open_circuit(run)
    with console.progress() as steps:
        with steps.step(f"opening {saved.result.manifest.model.source}"):
            model = reopen_model(saved, device)
        rows = _checked(model, saved, n_pairs, seed, n_random)
    passed = all(row["p"] <= LEVEL for row in rows)
    if as_json:
        console.emit_json({"run": run.as_posix(), "passed": passed, "checks": rows})
    else:
        shown = [
            (row["prompts"], row["n_pairs"], row["accuracy"], f"{row['faithfulness']:.3f}", f"{row['control']:.3f}",
             f"{row['p']:.3g}", console.verdict(row["p"] <= LEVEL))
            for row in rows
        ]  # fmt: skip
        columns = ("prompts", "pairs", "accuracy", "faithfulness", f"95 % of {n_random} controls", "p", "")
        console.table(f"{saved.circuit.size} edges, same degrees as control", columns, shown)
    if not passed:
        raise typer.Exit(1)


def _checked(model: Any, saved: SavedCircuit, n_pairs: int, seed: int, n_random: int) -> list[dict[str, Any]]:
    import dataclasses

    import numpy as np

    from interp.circuits.controls import draw_controls
    from interp.circuits.evaluate import faithfulness
    from interp.circuits.find import load
    from interp.core.controls import rank_test
    from interp.tasks.library import accuracy

    config = config_of(saved)
    if seed == config.seed:
        raise InterpError(f"--seed {seed} is that of the run; take another, so that the prompts are new")
    known = {tuple(row) for row in load(model, config).pairs.clean.ids.tolist()}
    data = load(model, dataclasses.replace(config, n_pairs=n_pairs, seed=seed, min_accuracy=0.0))
    drawn = draw_controls("degree-matched", saved.circuit, n_random, seed)
    rows: list[dict[str, Any]] = []
    for name, pairs in (("same words, new draw", data.pairs), ("other words", data.held)):
        if pairs is None:
            continue
        new = [i for i, row in enumerate(pairs.clean.ids.tolist()) if tuple(row) not in known]
        if not new:
            raise InterpError(f"--seed {seed}: the circuit was found on all of these prompts ({name}); take another")
        pairs = pairs.take(new)
        f = faithfulness(model, pairs, [saved.circuit, *drawn], pairs.metric()).mean.double().numpy()
        rows.append(
            {"prompts": name, "n_pairs": len(pairs), "accuracy": accuracy(model, pairs).interval.estimate,
             "faithfulness": float(f[0]), "control": float(np.quantile(f[1:], 0.95)),
             "p": rank_test(float(f[0]), f[1:])}
        )  # fmt: skip
    return rows


def compare(
    first: Annotated[Path, typer.Argument(metavar="RUN", help="A run of circuit find, or its name under runs/.")],
    second: Annotated[Path, typer.Argument(metavar="RUN", help="Another.")],
    transfer: Annotated[
        bool, typer.Option("--transfer/--no-transfer", help="Also run each circuit on the other's task.")
    ] = True,
    device: options.Device = "cpu",
    as_json: options.Json = False,
) -> None:
    """What two circuits share, against chance, and whether one serves the other's task."""
    a, b = open_circuit(first), open_circuit(second)
    if a.result.manifest.model.weight_hash != b.result.manifest.model.weight_hash:
        raise InterpError(
            f"the circuits are of two models, {a.result.manifest.model.source} and {b.result.manifest.model.source}; "
            "edges can only be compared within one"
        )
    from interp.circuits.reuse import circuit_overlap, compare_scores, rank_correlation

    names = _names(first, second)
    shared = circuit_overlap(a.circuit, b.circuit)
    ranks, rates = rank_correlation(a.scores, b.scores), compare_scores(a.scores, b.scores)
    served: list[dict[str, Any]] = []
    if transfer:
        with console.progress() as steps:
            with steps.step(f"opening {a.result.manifest.model.source}"):
                model = reopen_model(a, device)
            served = _served(model, dict(zip(names, (a, b), strict=True)))
    if as_json:
        rows = {
            name: {**vars(each), "jaccard": each.jaccard, "of_smaller": each.of_smaller}
            for name, each in shared.items()
        }
        console.emit_json(
            {"overlap": rows, "spearman": ranks, "top_heads": rates.to_dict("records"), "transfer": served}
        )
        return
    rows = [
        (name, each.n_a, each.n_b, each.n_both, f"{each.expected:.1f}", f"{each.jaccard:.3f}", f"{each.p:.2g}")
        for name, each in shared.items()
    ]
    console.table("Shared", ("", *names, "both", "by chance", "Jaccard", "p"), rows)
    console.table(
        f"Top heads by |score| (rank correlation of all parts {ranks:.3f})",
        ("share of heads", "heads", "shared", "by chance", "Jaccard", "p"),
        [(f"{r:.0%}", n, k, f"{e:.1f}", f"{j:.3f}", f"{p:.2g}") for r, n, k, e, j, p in rates.to_numpy().tolist()],
    )
    if served:
        rows = [(row["circuit"], row["task"], f"{row['faithfulness']:.3f}") for row in served]
        console.table("Faithfulness of each circuit on each task", ("circuit", "task", "faithfulness"), rows)


def _names(first: Path, second: Path) -> tuple[str, str]:
    """Names of two runs: of their folders, or the whole paths where these are alike, numbered if it is one run."""
    for a, b in ((first.name, second.name), (first.as_posix(), second.as_posix())):
        if a != b and a and b:
            return a, b
    return f"{first.as_posix()} (1)", f"{second.as_posix()} (2)"


def _served(model: Any, saved: dict[str, SavedCircuit]) -> list[dict[str, Any]]:
    """Transfer, with one circuit of the same degrees as a control for each."""
    from interp.circuits.controls import draw_controls
    from interp.circuits.find import load
    from interp.circuits.reuse import TaskCircuit, transfer

    tasks: dict[str, TaskCircuit] = {}
    drawn: dict[str, Any] = {}
    for name, each in saved.items():
        pairs = load(model, config_of(each)).pairs
        tasks[name] = TaskCircuit(pairs=pairs, metric=pairs.metric(), circuit=each.circuit)
        drawn[f"same degrees as {name} (random)"] = draw_controls("degree-matched", each.circuit, 1, 0)[0]
    return [dict(row) for row in transfer(model, tasks, drawn).to_dict("records")]


def show(
    run: options.RunFolder,
    n: Annotated[int, typer.Option("--n", help="Edges in the table.")] = 20,
    dot: Annotated[bool, typer.Option("--dot", help="Graphviz on stdout.")] = False,
    graphml: Annotated[bool, typer.Option("--graphml", help="GraphML on stdout.")] = False,
    as_json: options.Json = False,
) -> None:
    """The edges of a circuit, the heaviest first; or the whole of it for another program."""
    if sum((dot, graphml, as_json)) > 1:
        raise InterpError("--dot, --graphml and --json exclude each other; take one")
    saved = open_circuit(run)
    chosen = next((name for name, on in zip(FORMATS, (as_json, dot, graphml), strict=True) if on), None)
    if chosen is not None:
        import sys

        sys.stdout.write(exported(saved, chosen))
        return
    from interp.report.tables import shown

    headline = saved.result.headline
    f, p = shown(headline["faithfulness"]), shown(headline["p_degree_matched"])
    console.line(
        f"{saved.circuit.size} of {saved.circuit.graph.n_edges} edges, {len(saved.circuit.nodes())} nodes, "
        f"faithfulness {f}, p {p} against the same degrees"
    )
    rows = [
        (edge, f"{score:+.4g}", "" if effect != effect else f"{effect:+.4g}")
        for edge, score, effect in saved.result.tables["edges"][["edge", "score", "effect"]].head(n).to_numpy().tolist()
    ]
    console.table("", ("edge", "score", "measured effect"), rows, right=("score", "measured effect"))


def exported(saved: SavedCircuit, form: str) -> str:
    """The circuit as text for another program."""
    from interp.circuits.export import to_dot, to_graphml, to_json

    if form == "json":
        manifest = saved.result.manifest
        facts = {"model": manifest.model.source, "task": manifest.data["name"], "method": manifest.config["method"],
                 "faithfulness": saved.result.headline["faithfulness"]}  # fmt: skip
        return to_json(saved.circuit, saved.weights, **facts) + "\n"
    return (to_dot if form == "dot" else to_graphml)(saved.circuit, saved.weights)


def write_exports(folder: Path) -> None:
    """circuit.json, circuit.dot and circuit.graphml into a run folder, each whole or not at all."""
    saved = open_circuit(folder)
    for form in FORMATS:
        draft = folder / f".circuit.{form}.{uuid.uuid4().hex[:8]}"
        try:
            draft.write_text(exported(saved, form), encoding="utf-8")
            os.replace(draft, folder / f"circuit.{form}")
        except OSError as error:
            raise ArtefactError(f"could not write {folder / f'circuit.{form}'}: {error.strerror or error}") from error
        finally:
            draft.unlink(missing_ok=True)
