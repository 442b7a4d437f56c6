"""Options that several commands share, so that they are called the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from interp.core.errors import ArtefactError, InterpError, unknown

DEFAULT_MODEL = "smollm2-135m"
SHARED = ("--model", "--device", "--dtype", "--set", "--config", "--out", "--no-report", "--json", "--help")
"""Flags of every command that runs a method."""

Model = Annotated[
    str, typer.Option("--model", "-m", help="Bundled name, tiny-llama, Hugging Face id, folder or GGUF file.")
]
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Bundled name, tiny-llama, Hugging Face id, folder or GGUF file.")
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, float64, bfloat16 or float16.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output alone on stdout.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="K=V", help="Set a config field; may be repeated.")]
Config = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="YAML file with config fields.")]
Out = Annotated[Path | None, typer.Option("--out", metavar="FOLDER", help="Run folder. \\[default: runs/METHOD-TIME]")]
Report = Annotated[bool, typer.Option("--report/--no-report", help="Write report.html into the run folder.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or its name under runs/.")]

DTYPES = ("float32", "float64", "bfloat16", "float16")


def open_model(what: str, device: str = "cpu", dtype: str = "float32", *, check: bool = True) -> Any:
    """Load a model where the user wants it; a wrong device or dtype fails before anything is read."""
    import torch

    from interp.models.load import load

    name = dtype.removeprefix("torch.")
    if name not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    return load(what, device=check_device(device), dtype=getattr(torch, name), check=check)


def devices() -> list[str]:
    """Devices of this machine, best last."""
    import torch

    found = ["cpu"] + (["mps"] if torch.backends.mps.is_available() else [])
    return found + [f"cuda:{i}" for i in range(torch.cuda.device_count())]


def check_device(device: str) -> str:
    """The device, if this machine has it."""
    known = devices()
    if device in known or (device == "cuda" and len(known) > 1 and known[-1].startswith("cuda")):
        return device
    raise InterpError(f"device {device!r} is not on this machine; it has: {', '.join(known)}")


def find_run(folder: Path) -> Path:
    """The run folder that was meant: as given, or by name under runs/."""
    for candidate in (folder, Path("runs") / folder):
        if (candidate / "manifest.json").is_file():
            return candidate
    known = [path.parent.as_posix() for path in sorted(Path("runs").glob("*/manifest.json"))]
    raise unknown("run", folder.as_posix(), known, error=ArtefactError)


def check_out(folder: Path) -> Path:
    """The folder, if a run may be written there: said before the work, not after it."""
    if folder.exists() and not folder.is_dir():
        raise ArtefactError(f"{folder} is a file; choose another folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "manifest.json").exists():
        raise ArtefactError(f"{folder} is not empty and not a run; choose another folder")
    return folder
