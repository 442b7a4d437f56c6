"""From one layout to another, with the proof that nothing changed.

The result is written under another name, read back, turned into the layout it came from and read again, and compared
with the original on random inputs and, where activations are given, on real ones; the library that owns the target
layout reads it too where it is installed. Only then does it get its name, with `proof.json` in the folder (or
`NAME.proof.json` beside a file). A conversion that is not equal leaves nothing behind.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from interp.core.errors import ArtefactError, InterpError
from interp.dictionaries.formats import circuit_tracer, saelens
from interp.dictionaries.formats.files import publish, write_json
from interp.dictionaries.formats.peers import peer, version
from interp.dictionaries.formats.plain import Hints
from interp.dictionaries.formats.proof import prove
from interp.dictionaries.formats.table import Format, load_dictionary, named, recognise, save_dictionary
from interp.dictionaries.saved import SavedDictionary

PROOF = "proof.json"


def proof_path(target: Path) -> Path:
    """Where the proof of a converted dictionary lies."""
    return target / PROOF if target.is_dir() else target.with_suffix(".proof.json")


def convert(
    source: Path | str,
    target: Path | str,
    format: str,
    *,
    source_format: str | None = None,
    hints: Hints | None = None,
    real: Float[Tensor, "n d_in"] | None = None,
    peers: bool = True,
) -> Mapping[str, Any]:
    """Write `source` as `target` in another format; the proof. Raises InterpError where it cannot be expressed."""
    source, target, chosen = Path(source), Path(target), named(format)
    if target.resolve() == source.resolve():
        raise InterpError(f"{target} is the source; choose another place for the result")
    _check_place(target, chosen)
    origin = recognise(source) if source_format is None else named(source_format)
    before = load_dictionary(source, origin.name, hints)
    room = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}"
    try:
        room.mkdir(parents=True)
        draft = _write(before, room / _name(target, chosen, before), chosen, source, origin)
        after = load_dictionary(draft, format)
        back_as = origin.name if origin.write is not None else "interp"
        back = load_dictionary(
            save_dictionary(after, room / "back" / _name(source, named(back_as), before), back_as), back_as
        )
        theirs = peer(format, draft) if peers else None
        proof = {
            "source": source.as_posix(),
            "source_format": origin.name,
            "format": format,
            "back_as": back_as,
            "judged_by": version(format) if theirs is not None else None,
            **prove(before.dictionary, after.dictionary, back.dictionary, theirs, real),
        }
        if not proof["equal"]:
            raise ArtefactError(f"the conversion of {source} to {format} is not equal: {_worst(proof)}")
        return _publish(draft, target, proof, chosen)
    except OSError as error:
        raise ArtefactError(f"could not write {target}: {error}; free space or choose another place") from error
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _write(before: SavedDictionary, draft: Path, chosen: Format, source: Path, origin: Format) -> Path:
    if chosen.name == "saelens":
        density = saelens.read_density(source) if origin.name == "saelens" else None
        if density is not None and len(density) != before.dictionary.d_dict:
            density = None  # signed codes became two latents each
        return saelens.write(before, draft, density=density)
    return save_dictionary(before, draft, chosen.name)


def _name(place: Path, chosen: Format, saved: SavedDictionary) -> str:
    """A name that the format accepts: some read the layer or the hookpoint from it."""
    if not chosen.is_file:
        return place.name
    if chosen.name == "circuit-tracer" and circuit_tracer.LAYER.fullmatch(place.name) is None:
        return f"layer_{saved.about.get('layer', 0)}.safetensors"
    return place.with_suffix(".safetensors").name


def _check_place(target: Path, chosen: Format) -> None:
    """Said before the work, not after it."""
    if chosen.is_file and target.suffix != ".safetensors":
        raise InterpError(f"{target} should end in .safetensors: {chosen.name} keeps {chosen.layout}")
    if target.exists() and not chosen.found(target) and not (target.is_dir() and not any(target.iterdir())):
        raise ArtefactError(f"{target} exists and is no {chosen.name} dictionary; choose another place")


def _publish(draft: Path, target: Path, proof: dict[str, Any], chosen: Format) -> Mapping[str, Any]:
    if draft.is_dir():
        write_json(draft / PROOF, proof)

    def move(place: Path) -> None:
        draft.rename(place)

    publish(target, move, replaces=Path.exists)
    if not target.is_dir():
        publish(proof_path(target), lambda place: write_json(place, proof), replaces=lambda place: place.is_file())
    return proof


def _worst(proof: Mapping[str, Any]) -> str:
    rows = {name: row for name, row in proof["comparisons"].items() if not row["equal"]}
    return "; ".join(
        f"{name}: error {row['error']:.1e}, codes {row['code_error']:.1e}, other latents at "
        f"{100 * row['switched']:.1f} % of tokens, L0 {row['l0']:.1f}"
        for name, row in rows.items()
    )
