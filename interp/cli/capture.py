"""`interp capture`, `interp plan capture`, `interp audit`: activations of a whole corpus on disk, and what is there.

Under torchrun (`torchrun --nproc-per-node 2 -m interp.cli capture ...`) every process captures its share of the shards
of one store; the first one talks.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from interp.cli import console, options
from interp.cli.capture_job import CaptureJob
from interp.core.errors import InterpError

PANEL = "Capture at scale"
COLLECTIVE_HOURS = 24
"""How long a process may wait for the others: shards are written without any exchange."""

CORPORA = """

\b
Corpora (--corpus NAME):
  docs, docs:TOPIC                 Python's reference, on every machine
  docstrings:PACKAGE               of an installed package, read, not run
  file:PATH                        a text file, one document
  folder:PATH?glob=*.txt           text files below a folder
  jsonl:PATH?field=text            JSON lines, also .gz
  parquet:PATH?column=text         a file, or a folder of files
  dataset:PATH_OR_NAME?column=text of `datasets`, on disk or streamed;
                                   also split=NAME and shuffle=SEED
  sampled?seed=0&temperature=0.8   text drawn from the model itself
  images:FOLDER?size=224           also mean=0.5 and std=0.5
  array:PATH.npy                   items on the first axis; .npz?name=x
From folder to dataset also skip=N and take=N; options are joined by &.
"""

Sites = Annotated[str, typer.Option("--sites", help="Comma-separated, e.g. 'resid_post.10,gate.{3,5}'.")]
Corpus = Annotated[str, typer.Option("--corpus", help="Where the input comes from: see the list above.")]
Length = Annotated[int, typer.Option("--length", min=1, help="Tokens per sequence.")]
Pack = Annotated[
    bool | None,
    typer.Option("--pack/--pad", help="Documents end to end fill every sequence, or a document is a sequence."),
]
Separator = Annotated[int | None, typer.Option("--separator", help="Token id between packed documents.")]
Tokens = Annotated[
    int | None,
    typer.Option(
        "--tokens", min=1, help="Stop once there are so many; the last sequence is kept whole. Images, arrays: items."
    ),
]
StoreDtype = Annotated[str, typer.Option("--store-dtype", help="float32, float16, bfloat16 or int8.")]
Rows = Annotated[int, typer.Option("--rows-per-forward", min=1, help="Sequences per forward pass.")]
ShardBytes = Annotated[int, typer.Option("--shard-bytes", min=1, help="Bytes per shard, about; two are in memory.")]
OutStores = Annotated[str, typer.Option("--out", metavar="FOLDER", help="Folder of stores, or a URL fsspec knows.")]


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel=PANEL, help=f"{capture.__doc__}{CORPORA}", short_help=capture.__doc__)(capture)
    plan = typer.Typer(help="What a long job will need, before it starts.", no_args_is_help=True)
    plan.command("capture", help=f"{plan_command.__doc__}{CORPORA}", short_help=plan_command.__doc__)(plan_command)
    app.add_typer(plan, name="plan", rich_help_panel=PANEL)
    app.command(rich_help_panel=PANEL)(audit)


def capture(
    sites: Sites,
    model: options.Model = options.DEFAULT_MODEL,
    corpus: Corpus = "docs",
    length: Length = 128,
    pack: Pack = None,
    separator: Separator = None,
    tokens: Tokens = None,
    store_dtype: StoreDtype = "float16",
    rows_per_forward: Rows = 8,
    shard_bytes: ShardBytes = 256 << 20,
    out: OutStores = "runs/stores",
    force: Annotated[bool, typer.Option("--force", help="Start although the plan says that it will not fit.")] = False,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    as_json: options.Json = False,
) -> None:
    """Run a corpus through a model and store what it has at some sites. Killed, it goes on where it was."""
    from interp.instrument.store import ActivationStore

    with _processes() as rank, _quiet_unless(rank == 0), console.progress() as steps:
        job = CaptureJob(
            model, sites, corpus, length, pack, separator, tokens, store_dtype, rows_per_forward, shard_bytes
        )
        job.open(steps, device, dtype)
        if not force:
            with steps.step("trying two batches"):
                _agreed(rank, lambda: job.plan(out).check())
        store = ActivationStore.write(job.model, job.batches, job.sites, out, job.config)
        if rank:
            return
        facts = {
            "store": str(store.folder),
            "tokens": len(store),
            "shards": len(store.sizes),
            "bytes": sum(shard["bytes"] for shard in store.manifest["shards"]),
            "dtype": store.manifest["dtype"],
            "relative_error": store.manifest["relative_error"],
            "padding": job.padding,
        }
    if as_json:
        console.emit_json(facts)
        return
    _say_store(store, facts)


def plan_command(
    sites: Sites,
    model: options.Model = options.DEFAULT_MODEL,
    corpus: Corpus = "docs",
    length: Length = 128,
    pack: Pack = None,
    separator: Separator = None,
    tokens: Tokens = None,
    store_dtype: StoreDtype = "float16",
    rows_per_forward: Rows = 8,
    shard_bytes: ShardBytes = 256 << 20,
    out: OutStores = "runs/stores",
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    as_json: options.Json = False,
) -> None:
    """Tokens, disk, memory and time of a capture, by really running two batches (exit status 1: will not fit)."""
    with console.progress() as steps:
        job = CaptureJob(
            model, sites, corpus, length, pack, separator, tokens, store_dtype, rows_per_forward, shard_bytes
        )
        job.open(steps, device, dtype)
        with steps.step("trying two batches"):
            made = job.plan(out)
    if as_json:
        console.emit_json({**asdict(made), "fits": not made.refusals, "padding": job.padding, "asked": tokens})
    else:
        _say_plan(made, job.padding, None if job.of_items else tokens)
    if made.refusals:
        raise typer.Exit(1)


def audit(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A store, or a folder of stores; a URL for one store.")],
    as_json: options.Json = False,
) -> None:
    """Is every byte of a store as it was written, and is anything there that should not be? (exit status 1 if so)"""
    from interp.instrument.store_audit import audit as check

    folders = _stores(path)
    with console.progress() as steps:
        found: dict[str, list[Any]] = {}
        for folder in folders:
            with steps.step(f"auditing {folder}"):
                found[folder] = check(folder)
        found[path] = [*found.get(path, []), *_pickles_below(path, folders)]
        if not found[path] and path not in folders:
            del found[path]
    n_bad = sum(map(len, found.values()))
    if as_json:
        console.emit_json({folder: [asdict(finding) for finding in findings] for folder, findings in found.items()})
    else:
        for folder, findings in found.items():
            console.line(f"{folder}: {'every byte as it was written' if not findings else f'{len(findings)} findings'}")
            for finding in findings:
                console.line(f"  {finding}", "bold red")
    if n_bad:
        raise typer.Exit(1)


def _stores(path: str) -> list[str]:
    """The store at a path, or those in a folder of stores."""
    folder = Path(path)
    if "://" in path or not folder.is_dir():
        return [path]
    inside = sorted(
        child.as_posix()
        for child in folder.iterdir()
        if (child / "manifest.json").is_file() or (child / "plan.json").is_file()
    )
    return inside or [path]


def _pickles_below(path: str, stores: list[str]) -> list[Any]:
    """Files below a folder that may be pickles, but for those in stores, which their audit names."""
    from interp.instrument.store_audit import PICKLES, pickle

    root, named = Path(path), {Path(store) for store in stores}
    if "://" in path or not root.is_dir():
        return []
    found = sorted(p for p in root.rglob("*") if p.suffix.lower() in PICKLES and p.is_file())
    return [pickle(p.relative_to(root).as_posix()) for p in found if not named & {*p.parents}]


@contextmanager
def _processes() -> Generator[int, None, None]:
    """This process's rank; joins the others where torchrun started several."""
    from interp.instrument.store_ranks import joined

    with joined(timeout=timedelta(hours=COLLECTIVE_HOURS)) as ranks:
        yield ranks.rank


def _agreed(rank: int, check: Callable[[], object]) -> None:
    """The first process checks; where it refuses, all end before anything is written, and only it says why."""
    import torch
    import torch.distributed as dist

    refused: InterpError | None = None
    if rank == 0:
        try:
            check()
        except InterpError as error:
            refused = error
    said = torch.tensor([refused is not None])
    if dist.is_available() and dist.is_initialized():
        dist.broadcast(said, 0)
    if refused is not None:
        raise refused
    if bool(said):
        raise typer.Exit(2)


@contextmanager
def _quiet_unless(speaks: bool) -> Generator[None, None, None]:
    """Only one process reports progress."""
    if speaks:
        yield
        return
    from contextlib import redirect_stderr
    from io import StringIO

    with redirect_stderr(StringIO()):
        yield


def _say_plan(plan: Any, padding: float, asked: int | None) -> None:
    from interp.instrument.plan import size_text

    per_hour = plan.seconds / 3600
    took = f"{plan.seconds:.1f} s" if plan.seconds < 600 else f"{per_hour:.1f} h"
    free = "" if plan.disk_free is None else f"of {size_text(plan.disk_free)} free"
    whole = f"; {asked:,} were asked for, sequences are kept whole" if asked and plan.n_tokens > asked else ""
    rows = [
        ("sites", len(plan.sites), ", ".join(plan.sites[:4]) + (", ..." if len(plan.sites) > 4 else "")),
        ("tokens", f"{plan.n_tokens:,}", f"in {plan.n_batches:,} batches, {padding:.1%} padding{whole}"),
        ("disk", size_text(plan.disk_bytes), f"{free}, {plan.n_shards} shards of {plan.dtype}".lstrip(", ")),
        ("memory", size_text(plan.memory_bytes), f"peak, model included, of {size_text(plan.memory_free)}"),
        ("time", took, f"at {plan.tokens_per_second:,.0f} tokens/s; N processes need about 1/N where cores are free"),
    ]
    console.table("", ("", "", ""), rows, right=())
    for reason in plan.refusals:
        console.line(f"will not fit: {reason}", "bold red")


def _say_store(store: Any, facts: dict[str, Any]) -> None:
    from interp.instrument.plan import size_text

    summary = store.manifest["summary"]
    rows = [
        (
            name,
            " ".join(map(str, shape)),
            f"{facts['relative_error'][name]:.2g}",
            f"{summary[name]['norm']['mean']:.4g}",
        )
        for name, shape in store.sites.items()
    ]
    console.table("", ("site", "shape", "relative error", "mean norm"), rows, right=("relative error", "mean norm"))
    padding = f", {facts['padding']:.1%} padding" if facts["padding"] else ""
    console.line(
        f"stored  {facts['store']}  {facts['tokens']:,} tokens, {size_text(facts['bytes'])} in {facts['shards']} shards"
        f"{padding}",
        "bold",
    )
