"""`interp steer extract`: only build a steering vector from contrast pairs and save it, without the sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from interp.cli import console, options
from interp.core.errors import InterpError, unknown

DEPTH = 0.55
"""Fraction of the depth at which the vector is read where no layer is named."""
METHODS = ("mean", "pca")


def register(app: typer.Typer) -> None:
    app.command("extract")(extract)


def extract(
    model: options.Model = options.DEFAULT_MODEL,
    layer: Annotated[
        int | None, typer.Option("--layer", help="Block to read after. \\[default: 55 % of depth]")
    ] = None,
    method: Annotated[str, typer.Option("--method", help="mean or pca of the differences.")] = "mean",
    strength: Annotated[float, typer.Option("--strength", help="Recommended multiple of the activation norm.")] = 0.3,
    n_pairs: Annotated[int, typer.Option("--n-pairs", help="Sentiment contrast pairs to use.")] = 40,
    corpus: Annotated[str, typer.Option("--corpus", help="Neutral text whose norm is the unit.")] = "docs:assignment",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="\\[default: runs/vectors/SITE.safetensors]")
    ] = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    as_json: options.Json = False,
) -> None:
    """Only build the vector and save it with its site, sign, unit, positions and model hash."""
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if out is not None and out.suffix != ".safetensors":
        raise InterpError(f"--out {out.as_posix()} should end in .safetensors: a vector is one such file")
    from interp.steering.vectors import extract as build
    from interp.tasks.corpora import load_corpus
    from interp.tasks.sentiment import sentiment_pairs

    pairs = sentiment_pairs(n_pairs)
    with console.progress() as steps:
        with steps.step(f"opening {model}"):
            opened = options.open_model(model, device, dtype)
        chosen = int(DEPTH * opened.n_layers) if layer is None else layer
        with steps.step(f"reading {2 * len(pairs.positive)} sentences"):
            neutral = load_corpus(opened, corpus, 2, 64)
            vector = build(opened, pairs, chosen, neutral=neutral, method=_method(method), strength=strength)
        path = vector.save(out or Path("runs") / "vectors" / f"{Path(opened.source).name}.{vector.site}.safetensors")
    facts = {name: value for name, value in vars(vector).items() if name != "vector"}
    if as_json:
        console.emit_json({"vector": path.as_posix(), **facts})
        return
    console.table("", ("", ""), [(name.replace("_", " "), value) for name, value in facts.items()])
    console.line(f"saved  {path.as_posix()}", "bold")


def _method(text: str) -> Any:
    """The name, once it is known to be one of METHODS."""
    return text
