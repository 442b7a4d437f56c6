"""`interp tasks`: what a model can be asked, and whether it can do it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from interp.cli import console, options
from interp.core.errors import InterpError

PANEL = "Look into a model"
Name = Annotated[str | None, typer.Argument(metavar="TASK", help="One task in full; without it, all of them.")]
Asked = Annotated[str | None, typer.Option("--model", "-m", help="Ask this model, and say how often it is right.")]
Pairs = Annotated[int, typer.Option("--n-prompts", "-n", help="Prompt pairs.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the random prompts.")]
Corruption = Annotated[str, typer.Option("--corruption", help="Which; the task's first by default.")]
Split = Annotated[str, typer.Option("--split", help="train, or test: words and sentences that train never uses.")]


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel=PANEL)(tasks)


def tasks(
    task: Name = None,
    model: Asked = None,
    n_prompts: Pairs = 32,
    seed: Seed = 0,
    corruption: Corruption = "",
    split: Split = "train",
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    as_json: options.Json = False,
) -> None:
    """Tasks with known answers: their questions, corruptions and roles; with --model, how often a model is right."""
    from interp.tasks.library import TASKS, find_task

    chosen = list(TASKS.values()) if task is None else [find_task(task)]
    if task is None and corruption:
        raise InterpError(f"--corruption {corruption} needs a TASK; each task has corruptions of its own")
    rows = [_described(item) for item in chosen]
    if model is not None:
        measured = _asked(model, chosen, n_prompts, seed, corruption, split, device, dtype)
        rows = [row | found for row, found in zip(rows, measured, strict=True)]
    if as_json:
        console.emit_json({"tasks": rows} if model is None else {"model": model, "tasks": rows})
    elif task is not None:
        _print_one(rows[0])
    elif model is not None:
        _print_accuracies(model, rows)
    else:
        shown = [
            (r["task"], r["question"], ", ".join(r["corruptions"]), " ".join(r["roles"]), r["metric"]) for r in rows
        ]  # fmt: skip
        console.table("", ("task", "question", "corruptions", "roles", "measured by"), shown)
        console.line("interp tasks TASK --model MODEL shows prompts of one and how often the model is right.", "dim")


def _described(task: Any) -> dict[str, Any]:
    return {
        "task": task.name,
        "question": task.question,
        "example": task.example,
        "corruptions": dict(task.corruptions),
        "roles": dict(task.roles),
        "metric": task.metric,
        "words": task.words,
        "paper": task.paper,
    }


def _asked(
    model: str, chosen: list[Any], n: int, seed: int, corruption: str, split: str, device: str, dtype: str
) -> list[dict[str, Any]]:
    """Accuracy of each task; a task that cannot be asked of this model says why, unless it is the only one."""
    from interp.tasks.library import accuracy

    found: list[dict[str, Any]] = []
    with console.progress() as steps:
        with steps.step(f"opening {model}"):
            opened = options.open_model(model, device, dtype, check=False)  # no site is read
        for task in chosen:
            with steps.step(task.name):
                try:
                    pairs = task.pairs(opened, n, seed, corruption, split)
                except InterpError as error:
                    if len(chosen) == 1:
                        raise
                    found.append({"refused": str(error)})
                    continue
                share = accuracy(opened, pairs)
            found.append(
                {
                    "accuracy": share.interval.estimate,
                    "accuracy_low": share.interval.low,
                    "accuracy_high": share.interval.high,
                    "n_right": share.n_right,
                    "n_pairs": share.n,
                    "n_top1": share.n_top1,
                    "n_pos": pairs.n_pos,
                    "n_dropped": pairs.n_dropped,
                    "notes": list(pairs.notes),
                    "pairs": _examples(pairs),
                }
            )
    return found


def _examples(pairs: Any, n: int = 3) -> list[dict[str, str]]:
    """The first pairs as text."""
    return [
        {"clean": "".join(pairs.clean.strings[row]), "corrupt": "".join(pairs.corrupt.strings[row])}
        for row in range(min(n, len(pairs)))
    ]


def _print_one(row: dict[str, Any]) -> None:
    console.line(f"{row['task']}: {row['question']}", "bold")
    console.line(row["example"])
    console.table("", ("corruption", "what it changes"), list(row["corruptions"].items()))
    console.table("", ("role", "token"), list(row["roles"].items()))
    console.line(f"Measured by {row['metric']}. {row['paper']}", "dim")
    if "accuracy" not in row:
        return
    console.line(f"{_share(row)}; the right answer is the likeliest next token in {row['n_top1']}.")
    for pair in row["pairs"]:
        console.line(f"clean      {pair['clean']!r}")
        console.line(f"corrupted  {pair['corrupt']!r}")
    for note in row["notes"]:
        console.line(note, "dim")


def _print_accuracies(model: str, rows: list[dict[str, Any]]) -> None:
    shown = [
        (r["task"], r.get("n_pos", ""), r.get("n_dropped", ""), r.get("n_top1", ""), r.get("refused") or _share(r))
        for r in rows
    ]
    console.table(model, ("task", "tokens", "dropped", "likeliest", "right"), shown)


def _share(row: dict[str, Any]) -> str:
    return (
        f"{row['n_right']} of {row['n_pairs']} ({row['accuracy']:.0%}, 95 % interval {row['accuracy_low']:.0%} to "
        f"{row['accuracy_high']:.0%})"
    )
