"""`interp bench`: how fast the workbench is, as ratios against other ways of doing the same in the same process.

Systems take turns (round-robin), after one warm-up each; the table gives the median, the spread, and the ratio of
medians to the first row of its group, in wall time and in processor time. Peak memory is measured in a turn of its
own, and so is the largest difference of the logits to those of the first row. Peers that are not installed are left
out and named. Absolute times belong to this machine and this hour; the ratios are what to compare. On a busy machine
wall time says little: compare processor time, with `OMP_WAIT_POLICY=PASSIVE`, so that threads do not wait by spinning.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from interp.cli import console, options
from interp.cli.bench_capture import Group, Notes, capture_groups
from interp.cli.bench_memory import peak_bytes
from interp.cli.bench_patching import patching_groups
from interp.cli.bench_sae import sae_groups
from interp.core.errors import ArtefactError, unknown


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One system's times."""

    work: str
    case: str
    system: str
    median_s: float
    low_s: float
    high_s: float
    ratio: float
    """Median over the median of the group's first system."""
    ratio_low: float
    """The same of the fastest turns: what is left when the rest of the machine is quiet."""
    cpu_s: float
    """Median of the processor time of all threads, which a busy machine moves less than the clock on the wall."""
    cpu_ratio: float
    peak_bytes: int | None
    """Peak memory above the level before the call."""
    difference: float | None
    """Largest difference of its logits to the first system's; 0 is bit for bit."""


@dataclass(kw_only=True)
class Bench:
    """What a benchmark is given."""

    model: Any
    bf16: bool = False
    peers: bool = True
    notes: Notes = field(default_factory=Notes)


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Look after it")(bench)


def bench(
    work: Annotated[str, typer.Argument(help="capture, store, patching, sae or all.")] = "all",
    model: options.Model = options.DEFAULT_MODEL,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Turns each system gets.")] = 5,
    threads: Annotated[int, typer.Option("--threads", min=0, help="torch threads; 0 leaves torch's choice.")] = 0,
    bf16: Annotated[bool, typer.Option("--bf16", help="capture: also in bfloat16, with its error per part.")] = False,
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Beside other libraries.")] = True,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write the JSON here as well.")] = None,
    as_json: options.Json = False,
) -> None:
    """Time capture, the store, exact patching and SAE training against their peers, in one process."""
    names = list(WORKS) if work == "all" else [work]
    if work != "all" and work not in WORKS:
        raise unknown("work", work, [*WORKS, "all"])
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise ArtefactError(f"{out} is no file that can be written; name a file in a folder that exists")
    timings: list[Timing] = []
    with _threads(threads), console.progress() as steps:
        needed = bool(set(names) - set(NEEDS_NO_MODEL))
        given = Bench(model=options.open_model(model, check=False) if needed else None, bf16=bf16, peers=peers)
        found = _document(given, model if needed else None, rounds, timings)
        for name in names:
            with steps.step(f"timing {name}"):
                for group in WORKS[name](given):
                    with _frozen():
                        timings += _race(name, group, rounds)
                    found = _document(given, model if needed else None, rounds, timings)
                    if out is not None:  # after every group, for who must stop it early
                        _write(out, found)
    if as_json:
        console.emit_json(found)
    else:
        _show(timings, given.notes)


def _write(out: Path, found: dict[str, Any]) -> None:
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    temporary.write_text(json.dumps(found, indent=2) + "\n")
    temporary.replace(out)


def _document(given: Bench, model: str | None, rounds: int, timings: list[Timing]) -> dict[str, Any]:
    import torch

    return {
        "model": model,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": [round(load, 2) for load in os.getloadavg()],
        "timings": [asdict(timing) for timing in timings],
        **asdict(given.notes),
    }


def _show(timings: list[Timing], notes: Notes) -> None:
    columns = ("system", "median s", "spread s", "ratio", "of the fastest", "cpu", "peak MB", "logits differ by")
    for work, case in dict.fromkeys((t.work, t.case) for t in timings):
        rows = [
            (
                t.system, f"{t.median_s:.3f}", f"{t.low_s:.3f} to {t.high_s:.3f}", f"{t.ratio:.2f}",
                f"{t.ratio_low:.2f}", f"{t.cpu_ratio:.2f}", "" if t.peak_bytes is None else f"{t.peak_bytes / 1e6:.0f}",
                "" if t.difference is None else f"{t.difference:.2g}",
            )
            for t in timings if (t.work, t.case) == (work, case)
        ]  # fmt: skip
        console.table(f"{work}: {case}", columns, rows, right=columns[1:])
    if notes.bf16_error:
        rows = [(part, f"{e['median']:.1e}", f"{e['max']:.1e}") for part, e in notes.bf16_error.items()]
        console.table("relative error of bfloat16, over layers", ("part", "median", "largest"), rows)
    for name, reason in notes.left_out.items():
        console.line(f"left out: {name} ({reason})")


@contextmanager
def _frozen() -> Generator[None, None, None]:
    """What exists already is left out of the collections between turns, which would take longer than short systems."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _threads(n: int) -> Generator[None, None, None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _race(work: str, group: Group, rounds: int) -> list[Timing]:
    seconds: dict[str, list[float]] = {name: [] for name in group.systems}
    cpu: dict[str, list[float]] = {name: [] for name in group.systems}
    for number in range(rounds + 1):
        for name, run in group.systems.items():
            gc.collect()
            began, busy = time.perf_counter(), time.process_time()
            result = run()
            if number:
                cpu[name].append((time.process_time() - busy) * group.scale.get(name, 1.0))
                seconds[name].append((time.perf_counter() - began) * group.scale.get(name, 1.0))
            del result  # before the next begins: its memory is nobody's help or burden
    first, first_cpu = next(iter(seconds.values())), statistics.median(next(iter(cpu.values())))
    reference: Any = None
    timings: list[Timing] = []
    for name, times in seconds.items():
        result, peak = peak_bytes(group.systems[name])
        reference = result if reference is None else reference
        timings.append(
            Timing(
                work=work,
                case=group.case,
                system=name,
                median_s=statistics.median(times),
                low_s=min(times),
                high_s=max(times),
                ratio=statistics.median(times) / statistics.median(first),
                ratio_low=min(times) / min(first),
                cpu_s=statistics.median(cpu[name]),
                cpu_ratio=statistics.median(cpu[name]) / max(first_cpu, 1e-9),
                peak_bytes=peak,
                difference=_difference(reference, result),
            )
        )
    return timings


def _difference(reference: Any, result: Any) -> float | None:
    import torch

    if not isinstance(result, torch.Tensor) or not isinstance(reference, torch.Tensor):
        return None
    if result.shape != reference.shape:
        return None
    return float((result.float() - reference.float()).abs().max())


def _capture(bench: Bench) -> Iterator[Group]:
    return capture_groups(bench.model, bench.notes, bf16=bench.bf16, with_peers=bench.peers)


def _store(_bench: Bench) -> Iterator[Group]:
    """Writing 230 MB with fsync, and gathering random rows, against the raw file system."""
    from interp.instrument.store_bench import read_systems, write_systems

    with TemporaryDirectory(prefix="interp-bench-", dir=Path.cwd()) as folder:
        yield Group(case="write and fsync", systems=write_systems(Path(folder)))
        yield Group(case="random rows", systems=read_systems(Path(folder)))


def _patching(bench: Bench) -> Iterator[Group]:
    return patching_groups(bench.model, bench.notes, with_peers=bench.peers)


def _sae(bench: Bench) -> Iterator[Group]:
    return sae_groups(bench.model, bench.notes, with_peers=bench.peers)


WORKS: dict[str, Callable[[Bench], Iterator[Group]]] = {
    "capture": _capture,
    "store": _store,
    "patching": _patching,
    "sae": _sae,
}
NEEDS_NO_MODEL = ("store",)
