"""`interp sae health PATH --model M`: is this dictionary what its files say, and right for this model?"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from interp.cli import console, options, sae_hints
from interp.core.errors import InterpError

Model = Annotated[
    str | None, typer.Option("--model", "-m", help="The model to use it on. \\[default: what the file says]")
]
Site = Annotated[str | None, typer.Option("--site", help="Where it reads. \\[default: what the file says]")]
TargetSite = Annotated[
    str | None,
    typer.Option("--target-site", help="What it predicts, for a transcoder. \\[default: what the file says]"),
]
Corpus = Annotated[str | None, typer.Option("--corpus", help="Text to measure on. \\[default: the certificate's]")]
Sequences = Annotated[int | None, typer.Option("--n-sequences", min=1, help="Sequences of it. \\[default: 16]")]
Length = Annotated[int | None, typer.Option("--length", min=2, help="Tokens per sequence. \\[default: 128]")]
Certify = Annotated[
    bool, typer.Option("--certify", help="If nothing speaks against it, save what was measured with the dictionary.")
]
SHOWN = ("fvu", "l0", "cosine", "norm_ratio", "dead_fraction", "mean_norm_in", "mean_norm_target")
STYLES = {"refuse": "bold red", "warn": "yellow", "note": "dim"}


def health(
    path: sae_hints.DictionaryPath,
    model: Model = None,
    site: Site = None,
    target_site: TargetSite = None,
    corpus: Corpus = None,
    n_sequences: Sequences = None,
    length: Length = None,
    certify: Certify = False,
    from_: sae_hints.From = None,
    layer: sae_hints.Layer = None,
    class_: sae_hints.Class = None,
    input_scale: sae_hints.InputScale = None,
    activation: sae_hints.Activation = None,
    k: sae_hints.K = None,
    threshold: sae_hints.Threshold = None,
    subtract_b_dec: sae_hints.Subtract = None,
    turned: sae_hints.Turned = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    as_json: options.Json = False,
) -> None:
    """Measure a dictionary on a model and name what is wrong with it. (exit status 1 if it should not be used)"""
    from interp.dictionaries.formats.table import WRITABLE, load_dictionary, recognise, rewrite
    from interp.dictionaries.health import check
    from interp.dictionaries.health_certificate import certified

    open_points = sae_hints.hints(layer, class_, input_scale, activation, k, threshold, subtract_b_dec, turned)
    saved = load_dictionary(path, from_, open_points)
    format_ = from_ or recognise(path).name
    if certify and format_ not in WRITABLE:
        raise InterpError(f"a certificate cannot be written into {format_} files; convert them first")
    source = model or saved.about.get("model")
    if not source:
        raise InterpError(f"{path.as_posix()} does not say which model it was trained on; pass --model")
    with console.progress() as steps:
        with steps.step(f"opening {source}"):
            opened = options.open_model(str(source), device, dtype)
        text = _text(saved.certificate, corpus, n_sequences, length)
        with steps.step("measuring"):
            found = check(saved, opened, site=site, target=target_site, text=text)
            written = certify and found.healthy
            if written:
                made = certified(saved, opened, text, site=site, target=target_site)
                rewrite(made, saved.path or path, format_)
    if as_json:
        findings = [vars(finding) for finding in found.findings]
        answer = {"dictionary": path.as_posix(), "model": opened.source, "healthy": found.healthy}
        console.emit_json(answer | {"certified": written, "findings": findings, "measured": dict(found.measured)})
    else:
        _show(saved.certificate or {}, found, written)
    if not found.healthy:
        raise typer.Exit(1)


def _show(certificate: Any, found: Any, written: bool) -> None:
    from rich.text import Text

    if found.measured:
        rows = [(name, _number(certificate.get(name)), _number(found.measured[name])) for name in SHOWN]
        console.table(str(found.measured["site"]), ("", "certified", "now"), rows, right=("certified", "now"))
    if found.findings:
        rows = [(Text(f.severity, style=STYLES[f.severity]), f.code, f.message) for f in found.findings]
        console.table("", ("", "finding", ""), rows)
    console.line("do not use it as it is" if not found.healthy else "nothing speaks against using it", "bold")
    if written:
        console.line("the certificate was saved with the dictionary")


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"


def _text(certificate: Any, corpus: str | None, n_sequences: int | None, length: int | None) -> Any:
    """The certificate's own text, as far as no flag says otherwise."""
    from dataclasses import replace

    from interp.dictionaries.health_sample import HealthText, text_of

    own, _ = text_of(certificate)
    changed = {"corpus": corpus, "n_sequences": n_sequences, "length": length}
    named = {name: value for name, value in changed.items() if value is not None}
    return replace(own if corpus is None else HealthText(), **named)
