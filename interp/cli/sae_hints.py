"""Options that say what the files of a dictionary leave open; most files leave nothing open."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from interp.core.errors import InterpError, unknown

if TYPE_CHECKING:
    from interp.dictionaries.formats.plain import Hints
    from interp.dictionaries.saved import SavedDictionary
    from interp.models.model import LoadedModel

PANEL = "What the files do not say"
TURNED = {"none": (False, False), "encoder": (True, False), "decoder": (False, True), "both": (True, True)}

DictionaryPath = Annotated[
    Path,
    typer.Argument(
        metavar="PATH", help="A dictionary: interp, SAELens, sparsify, circuit-tracer, dictionary_learning or plain."
    ),
]
From = Annotated[
    str | None, typer.Option("--from", help="Layout of PATH, where it cannot be told.", rich_help_panel=PANEL)
]
Layer = Annotated[
    int | None, typer.Option("--layer", help="circuit-tracer folders: which layer.", rich_help_panel=PANEL)
]
Class = Annotated[
    str | None, typer.Option("--class", help="dictionary_learning without a config: the class.", rich_help_panel=PANEL)
]
InputScale = Annotated[
    float | None,
    typer.Option("--input-scale", help="SAELens, expected_average_only_in: the scale.", rich_help_panel=PANEL),
]
Activation = Annotated[
    str | None, typer.Option("--activation", help="Bare files: topk, relu, jump_relu, ...", rich_help_panel=PANEL)
]
K = Annotated[int | None, typer.Option("--k", help="Bare files: active latents per token.", rich_help_panel=PANEL)]
Threshold = Annotated[
    float | None, typer.Option("--threshold", help="Bare files, batch_topk: the threshold.", rich_help_panel=PANEL)
]
Subtract = Annotated[
    bool | None,
    typer.Option(
        "--subtract-b-dec/--keep-b-dec", help="Bare files: is b_dec subtracted from the input?", rich_help_panel=PANEL
    ),
]
Turned = Annotated[
    str | None,
    typer.Option(
        "--turned", help="Bare square files: none, encoder, decoder or both lie transposed.", rich_help_panel=PANEL
    ),
]


Unchecked = Annotated[
    bool, typer.Option("--unchecked", help="Use it although `interp sae health` would refuse it on this model.")
]


def checked(
    saved: SavedDictionary, model: LoadedModel, site: str | None, target: str | None, *, use: bool
) -> list[str]:
    """What `interp sae health` warns of. Raises InterpError where it refuses the dictionary, unless `use`."""
    from interp.dictionaries.health import check

    if model.tokenizer is None:
        return []
    findings = check(saved, model, site=site, target=target).findings
    refused = [finding.message for finding in findings if finding.severity == "refuse"]
    if refused and not use:
        raise InterpError(f"{'; '.join(refused)} (see interp sae health; --unchecked goes on all the same)")
    return [finding.message for finding in findings if finding.severity != "note"]


def hints(
    layer: int | None,
    kind: str | None,
    input_scale: float | None,
    activation: str | None,
    k: int | None,
    threshold: float | None,
    subtract: bool | None,
    turned: str | None,
) -> Hints:
    """The options as the reader takes them."""
    from interp.dictionaries.formats.plain import Hints

    if turned is not None and turned not in TURNED:
        raise unknown("--turned", turned, TURNED)
    if input_scale is not None and input_scale <= 0:
        raise InterpError(f"--input-scale {input_scale} must be positive; it is sqrt(d_in) / mean |x|")
    return Hints(
        layer=layer, kind=kind, input_scale=input_scale, activation=activation, k=k, threshold=threshold,
        subtract_b_dec=subtract, turned=None if turned is None else TURNED[turned],
    )  # fmt: skip
