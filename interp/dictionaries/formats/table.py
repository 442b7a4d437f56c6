"""Layouts by name, and which of them a path is.

format               what it is on disk                                              written
interp               dictionary.json, weights.safetensors: this package's own        yes
saelens              cfg.json, sae_weights.safetensors (version 6 and older)         yes
sparsify             cfg.json, sae.safetensors                                       yes
circuit-tracer       layer_<i>.safetensors: W_enc and W_dec (m, d)                   yes
dictionary_learning  ae.pt, config.json                                              no: a pickle
plain                one .safetensors with W_enc (d, m), W_dec (m, d), b_enc, b_dec  yes
A path that is none of them, or more than one, is an ArtefactError that says what was found.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from interp.core.errors import ArtefactError, InterpError, unknown
from interp.dictionaries import saved as own
from interp.dictionaries.formats import circuit_tracer, dictionary_learning, plain, saelens, saelens_config, sparsify
from interp.dictionaries.formats.plain import Hints
from interp.dictionaries.saved import SavedDictionary


@dataclass(frozen=True, kw_only=True)
class Format:
    """One layout."""

    name: str
    layout: str
    """What lies on disk."""
    found: Callable[[Path], bool]
    """Whether a path has this layout."""
    read: Callable[[Path, Hints], SavedDictionary]
    write: Callable[[SavedDictionary, Path], Path] | None
    """None where it is only read."""
    is_file: bool = False


def _holds(*names: str) -> Callable[[Path], bool]:
    return lambda path: all((path / name).is_file() for name in names)


def _is_transcoder(path: Path) -> bool:
    if path.is_dir():
        return bool(circuit_tracer.layers(path))
    return circuit_tracer.is_transcoder(path) and not plain.is_ours(path)


def _is_plain(path: Path) -> bool:
    if not plain.is_plain(path):
        return False
    named = circuit_tracer.LAYER.fullmatch(path.name) and circuit_tracer.is_transcoder(path)
    return plain.is_ours(path) or (not named and not _one_latent_per_row(path))


def _one_latent_per_row(path: Path) -> bool:
    """Whether W_enc can only be circuit-tracer's (m, d)."""
    shape = circuit_tracer.read_header(path)[0]["W_enc"]
    return circuit_tracer.is_transcoder(path) and shape[0] != shape[1]


def _is_learned(path: Path) -> bool:
    return (path / dictionary_learning.WEIGHTS).is_file() or (path.is_file() and path.suffix == ".pt")


FORMATS = {
    item.name: item
    for item in (
        Format(
            name="interp", layout=f"a folder with {own.DESCRIPTION} and {own.WEIGHTS}",
            found=_holds(own.DESCRIPTION), read=lambda path, hints: own.load(path), write=own.save,
        ),
        Format(
            name="saelens", layout=f"a folder with {saelens_config.CONFIG} and {saelens.WEIGHTS}",
            found=_holds(saelens.WEIGHTS),
            read=lambda path, hints: saelens.read(path, input_scale=hints.input_scale), write=saelens.write,
        ),
        Format(
            name="sparsify", layout=f"a folder with {sparsify.CONFIG} and {sparsify.WEIGHTS}",
            found=_holds(sparsify.WEIGHTS), read=lambda path, hints: sparsify.read(path), write=sparsify.write,
        ),
        Format(
            name="circuit-tracer", layout="a file or a folder of layer_<i>.safetensors",
            found=_is_transcoder, read=lambda path, hints: circuit_tracer.read(path, layer=hints.layer),
            write=circuit_tracer.write, is_file=True,
        ),
        Format(
            name="dictionary_learning", layout=f"a folder with {dictionary_learning.WEIGHTS}", found=_is_learned,
            read=lambda path, hints: dictionary_learning.read(path, kind=hints.kind), write=None,
        ),
        Format(
            name="plain", layout="a .safetensors file with W_enc, b_enc, W_dec and b_dec", found=_is_plain,
            read=plain.read, write=plain.write, is_file=True,
        ),
    )
}  # fmt: skip
WRITABLE = tuple(name for name, item in FORMATS.items() if item.write is not None)


def recognise(path: Path | str) -> Format:
    """The layout of a path. Raises ArtefactError for none and for several."""
    path = Path(path)
    if not path.exists():
        raise ArtefactError(f"{path} does not exist")
    found = [item for item in FORMATS.values() if item.found(path)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ArtefactError(f"{path} could be {' or '.join(item.name for item in found)}; say which with format=")
    if path.is_dir() and circuit_tracer.is_cross_layer(path):
        raise ArtefactError(f"{path} is a cross-layer transcoder: formats.cross_layer.read_clt reads it")
    if path.is_dir() and (below := sparsify.coders(path)):
        raise ArtefactError(f"{path} is a sparsify run; name one of its coders: {', '.join(below)}")
    known = "; ".join(f"{item.name}: {item.layout}" for item in FORMATS.values())
    raise ArtefactError(f"{path} is no dictionary that is known here, it holds {_contents(path)}. Known are {known}")


def load_dictionary(path: Path | str, format: str | None = None, hints: Hints | None = None) -> SavedDictionary:
    """Read a dictionary of any layout. `hints` say what the files leave open."""
    path = Path(path)
    chosen = recognise(path) if format is None else named(format)
    return chosen.read(path, hints or Hints())


def save_dictionary(saved: SavedDictionary, path: Path | str, format: str = "interp") -> Path:
    """Write a dictionary. Raises InterpError where the format cannot express it, before anything is written."""
    chosen = named(format)
    if chosen.write is None:
        raise InterpError(f"{format} files are pickles and are only read here; write one of {', '.join(WRITABLE)}")
    return chosen.write(saved, Path(path))


def rewrite(saved: SavedDictionary, path: Path | str, format: str) -> Path:
    """Write again what was read from `path`, with what is now known about it; other files of a folder are kept."""
    path = Path(path)
    if not path.is_dir():
        return save_dictionary(saved, path, format)
    room = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}"
    try:
        room.mkdir()
        new = save_dictionary(saved, room / "new", format)
        merged = shutil.copytree(path, room / "merged", symlinks=True)
        for item in new.iterdir():
            item.replace(merged / item.name)
        path.rename(room / "old")
        try:
            merged.rename(path)
        except OSError:
            (room / "old").rename(path)
            raise
    except OSError as error:
        raise ArtefactError(f"could not write {path}: {error}; free space") from error
    finally:
        shutil.rmtree(room, ignore_errors=True)
    return path


def named(name: str) -> Format:
    """A format by name."""
    if name not in FORMATS:
        raise unknown("format", name, FORMATS)
    return FORMATS[name]


def _contents(path: Path) -> str:
    if path.is_file():
        return f"one file{', ' + ', '.join(circuit_tracer.read_header(path)[0]) if path.suffix == plain.SUFFIX else ''}"
    names = sorted(item.name for item in path.iterdir())
    return (", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")) or "nothing"
