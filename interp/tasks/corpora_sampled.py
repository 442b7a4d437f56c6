"""Text sampled from the model itself: its own distribution, with nothing to download.

Each row starts with the tokenizer's start token (or its end token, where there is no start) and goes on with draws from
softmax(logits / temperature). A row depends on the weights, the seed, its number and the temperature, not on how many
rows are drawn together, up to ties in the last bits. Rows are kept as ids in the cache, under the hash of all that.
Trap: at a temperature of 1 a small model soon leaves the language it was trained on; below 0.5 it repeats itself.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from interp.core.errors import InterpError
from interp.core.hash import hash_json
from interp.core.progress import track
from interp.core.seed import torch_generator
from interp.instrument.tokens import TokenRecord, from_ids
from interp.models.bundled import cache_dir
from interp.models.model import LoadedModel

ROWS = 16
"""Rows drawn together."""


def sampled_corpus(
    model: LoadedModel, n_sequences: int, length: int, *, seed: int = 0, temperature: float = 0.8, cache: bool = True
) -> TokenRecord:
    """`n_sequences` rows of `length` tokens, start token included."""
    if n_sequences < 1 or length < 2 or temperature <= 0:
        raise InterpError(
            f"n_sequences={n_sequences} must be at least 1, length={length} at least 2, "
            f"temperature={temperature} above 0"
        )
    if model.dims.n_ctx is not None and length > model.dims.n_ctx:
        raise InterpError(f"length={length} is more than the model's context of {model.dims.n_ctx}")
    start = _start(model)
    key = hash_json(
        [
            "sampled",
            model.weight_hash,
            model.config_hash,
            str(model.dtype),
            start,
            n_sequences,
            length,
            seed,
            temperature,
        ]
    )
    path = cache_dir() / "sampled" / f"{key}.safetensors"
    ids = _read(path) if cache else None
    if ids is None:
        parts = [
            _draw(model, range(first, min(first + ROWS, n_sequences)), length, start, seed, temperature)
            for first in track(range(0, n_sequences, ROWS), "sampling text")
        ]
        ids = torch.cat(parts)
        if cache:
            _write(path, ids)
    return from_ids(model, ids)


def _start(model: LoadedModel) -> int:
    tokenizer: Any = model.tokenizer
    for name in ("bos_token_id", "eos_token_id"):
        found = getattr(tokenizer, name, None)
        if found is not None:
            return int(found)
    raise InterpError(f"{model.source} has no start or end token to begin a text with; use another corpus")


def _draw(
    model: LoadedModel, rows: range, length: int, start: int, seed: int, temperature: float
) -> torch.Tensor:  # fmt: skip
    generators = [torch_generator(seed, "sampled", row) for row in rows]
    ids = torch.full((len(rows), 1), start, device=model.device)
    cache: Any = None
    with torch.no_grad():
        for _ in range(length - 1):
            new = ids if cache is None else ids[:, -1:]
            out: Any = model.module(input_ids=new, past_key_values=cache, use_cache=True)
            cache = getattr(out, "past_key_values", None)
            chances = torch.softmax(out.logits[:, -1].double().cpu() / temperature, dim=-1)
            drawn = [torch.multinomial(p, 1, generator=g) for p, g in zip(chances, generators, strict=True)]
            ids = torch.cat([ids, torch.stack(drawn).to(ids)], dim=1)
    return ids.cpu()


def _read(path: Path) -> torch.Tensor | None:
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("ids")
    except (OSError, SafetensorError):  # not drawn yet, or cut short: draw again
        return None


def _write(path: Path, ids: torch.Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    save_file({"ids": ids}, draft)
    os.replace(draft, path)
