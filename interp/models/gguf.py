"""GGUF files: turned once into a safetensors folder, kept by content.

The cache key is the hash of the file's bytes and the format version below, so a changed file is a new entry and a
moved one is not. The folder is written under a temporary name and renamed: two processes may convert at once (the
second finds the first one's folder), and a full disk leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import threading
import time
import uuid
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from interp.core.errors import ArtefactError, MissingPackageError
from interp.core.hash import hash_bytes, hash_tensors
from interp.core.progress import track
from interp.models.bundled import cache_dir

FORMAT = 1
"""Version of the converted folder; raise it when the conversion changes."""

FACTS = "interp.json"
"""File in the converted folder with the hash of the float32 weights and where they came from."""

_STALE_SECONDS = 3600.0
_DAMAGE = (
    ValueError, IndexError, KeyError, TypeError, RuntimeError, AttributeError, OSError, OverflowError, struct.error,
)  # fmt: skip
"""What transformers and gguf raise on files that are cut short or hold what they do not know."""
_patching = threading.Lock()


def converted(files: Sequence[Path], name: str) -> Path:
    """Folder with the dequantised float32 weights, config and tokenizer of a GGUF file (or of its parts, joined)."""
    _check_magic(files[0])
    key = hash_bytes(_digest(files).encode(), f"format {FORMAT}".encode())
    folder = cache_dir() / "models" / f"{name}-{key}"
    if not (folder / FACTS).is_file():
        _convert(files, name, folder)
    return folder


def facts(folder: Path) -> dict[str, Any]:
    """What was written down when the folder was converted."""
    try:
        return json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtefactError(f"the cached model {folder} is damaged; delete that folder and load again") from error


def _check_magic(path: Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise ArtefactError(f"could not read {path}: {error.strerror or error}") from error
    if start != b"GGUF":
        raise ArtefactError(f"{path} is not a GGUF file: it starts with {start!r}, not b'GGUF'")


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _convert(files: Sequence[Path], name: str, folder: Path) -> None:
    draft = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}"
    try:
        draft.mkdir(parents=True)
        _sweep(folder.parent)
        source = files[0] if len(files) == 1 else _join(files, draft / "joined.gguf")
        _write(source, name, draft)
        if len(files) > 1:
            source.unlink()
        if not (folder / FACTS).is_file():
            _rename(draft, folder)
    except (OSError, SafetensorError) as error:
        raise ArtefactError(
            f"could not write the converted weights of {name} to {folder.parent}: {error}; "
            "free space, or point INTERP_CACHE at another folder"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _rename(draft: Path, folder: Path) -> None:
    try:
        draft.rename(folder)
    except OSError:
        if not (folder / FACTS).is_file():  # not lost to another process that finished first
            raise


def _sweep(parent: Path) -> None:
    """Remove drafts that a killed process left behind."""
    for path in parent.glob(".*"):
        with suppress(OSError):  # another process may be removing it just now
            if path.is_dir() and time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _join(files: Sequence[Path], target: Path) -> Path:
    with target.open("wb") as out:
        for path in files:
            with path.open("rb") as file:
                shutil.copyfileobj(file, out, 1 << 22)
    return target


def _write(source: Path, name: str, draft: Path) -> None:
    """Dequantise `source`, then write weights, config, tokenizer and facts."""
    read: list[tuple[nn.Module, Any]] = []
    for step in track(("read", "write"), f"converting {name} (first time only)"):
        if step == "read":
            read.append(_read(source))
        else:
            _save(*read[0], name, draft)


def _save(module: nn.Module, tokenizer: Any, name: str, draft: Path) -> None:
    state = module.state_dict()
    config = cast(Any, module).config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # transformers refuses to save or load a config that still names it
    config.architectures = [type(module).__name__]
    config.save_pretrained(draft)
    if getattr(module, "generation_config", None) is not None:
        cast(Any, module).generation_config.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    save_file(_untied(state), draft / "model.safetensors", metadata={"format": "pt"})
    written = {"name": name, "weight_hash": hash_tensors(state), "format": FORMAT}
    (draft / FACTS).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def _untied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each storage once, under its first name: from_pretrained ties the other again."""
    seen: set[int] = set()
    kept: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            kept[key] = tensor.contiguous()
    return kept


def _read(source: Path) -> tuple[nn.Module, Any]:
    """Model and tokenizer as transformers reads them from a GGUF file, the weights unpacked to float32."""
    try:
        import accelerate  # noqa: F401  # pyright: ignore[reportUnusedImport, reportMissingTypeStubs]
        import gguf  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise MissingPackageError(f"GGUF files need {error.name}; run: pip install gguf accelerate") from error
    import transformers

    place: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True}
    unpack = getattr(transformers, "GgufConfig", None)  # newer versions keep some architectures packed unless told
    more: dict[str, Any] = {"quantization_config": unpack(dequantize=True)} if unpack else {}
    try:
        with _one_pass():
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(source.parent), **place)  # pyright: ignore
            module, report = transformers.AutoModelForCausalLM.from_pretrained(  # pyright: ignore
                str(source.parent), dtype=torch.float32, output_loading_info=True, **place, **more
            )
    except BaseException as error:
        if not isinstance(error, _DAMAGE) and type(error).__name__ != "PanicException":  # tokenizers panics, in Rust
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtefactError(f"{source} is damaged, or of a kind that transformers cannot read: {reason}") from error
    if absent := sorted(report["missing_keys"]):
        raise ArtefactError(f"{source} lacks {len(absent)} weights, first {absent[0]}")
    return cast(Any, module).eval(), tokenizer


@contextmanager
def _one_pass() -> Generator[None]:
    """Let transformers parse the file once instead of three times, and build its name table once instead of per module.

    It looks both up in the `gguf` module at every call; for the duration of the block they remember their answers.
    This halves the time of a conversion. Its progress bar, which no setting controls, is off as well.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reading

    kept: list[tuple[Any, str, Any]] = [
        (gguf, "GGUFReader", cache(gguf.GGUFReader)),
        (gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
        (reading, "tqdm", lambda items, **_: items),
    ]
    with _patching:
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in kept]
        try:
            for owner, name, value in kept:
                setattr(owner, name, value)
            yield
        finally:
            for owner, name, value in before:
                setattr(owner, name, value)
