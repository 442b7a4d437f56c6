"""How fast are the kernels on this machine, and how far from what it can do?

    python kernels/bench.py [--device cuda|cpu] [--threads N] [--shapes NAME ...] [--json FILE]

Needs torch, and triton where there is a GPU; nothing else has to be installed, and `interp` need not be importable.
In this order: correctness against float64 (a failure ends the run with status 1), the machine's own ceilings (copy
bandwidth, matrix products), every kernel beside its alternatives, whole training steps beside those of other libraries
that can be imported. Systems are timed in turn, round after round, in one process; what counts is the ratio of their
medians. Bytes and FLOP are those of the traffic model in each file, not counters of the hardware.
"""

import argparse
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def stand_alone() -> None:
    """Make `interp.kernels` importable from this folder alone, as when the file is run as a script."""
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
    if importlib.util.find_spec("interp") is not None:
        from interp import kernels

        if any(Path(entry).resolve() == HERE for entry in kernels.__path__):
            return
        another_copy = [name for name in sys.modules if name.split(".")[0] == "interp"]
        for name in another_copy:  # not the one to time
            del sys.modules[name]
    for name, folder in (("interp", []), ("interp.kernels", [str(HERE)])):
        module = types.ModuleType(name)
        module.__path__ = folder
        sys.modules[name] = module


def say(text: str = "") -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def table(rows: list[dict[str, Any]]) -> None:
    """Rows of equal keys, in columns."""
    cells = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for row in cells:
        say("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip())  # fmt: skip  # noqa: E501
    say()


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--shapes", nargs="+", help="names of shapes; default: those of the device. `list` lists them")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds")
    parser.add_argument("--only", choices=("check", "ceilings", "kernels", "tiles", "steps"), nargs="+")
    parser.add_argument("--json", type=Path, help="write every number there")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    asked = options(arguments)
    import torch

    from interp.kernels import bench_parts, bench_steps

    device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if asked.threads:
        torch.set_num_threads(asked.threads)
    if asked.shapes == ["list"]:
        table([vars(shape) for shape in bench_parts.SHAPES])
        return 0
    unknown = set(asked.shapes or ()) - {shape.name for shape in bench_parts.SHAPES}
    if unknown:
        raise SystemExit(f"unknown shapes {sorted(unknown)}; --shapes list lists them")
    shapes = [s for s in bench_parts.SHAPES if (s.name in asked.shapes if asked.shapes else s.device == device)]
    only = asked.only or ("check", "ceilings", "kernels", "tiles", "steps")
    machine = bench_parts.machine(device)
    result: dict[str, Any] = {"machine": machine}
    say("\n".join(f"{name}: {value}" for name, value in machine.items()) + "\n")
    if "check" in only:
        result["check"] = bench_parts.check(device)
        table(result["check"])
        if not all(row["ok"] for row in result["check"]):
            say("wrong results: nothing was timed")
            return 1
    ceilings = bench_parts.ceilings(device, asked.rounds)
    result["ceilings"] = ceilings
    table([{"ceiling": name, "value": value} for name, value in ceilings.items()])
    for part, measure in (
        ("kernels", bench_parts.kernels),
        ("tiles", bench_parts.tiles),
        ("steps", bench_steps.steps),
    ):
        for shape in shapes if part in only else ():
            rows = measure(shape, device, asked.rounds, ceilings)
            if rows:
                say(f"{part}, {shape.name}: B {shape.batch}, d {shape.d}, m {shape.m}, k {shape.k}, {shape.dtype}")
                table(rows)
                result.setdefault(part, {})[shape.name] = rows
    if asked.json:
        temporary = asked.json.with_suffix(".part")
        temporary.write_text(json.dumps(result, indent=1), encoding="utf-8")
        temporary.replace(asked.json)
    return 0


if __name__ == "__main__":
    stand_alone()
    sys.exit(main())
