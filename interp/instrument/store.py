"""A store: activations of many tokens on disk, written once, read shuffled without loading them all.

    store = ActivationStore.write(model, record, ["resid_post.10"], folder)
    for x in store.batches("resid_post.10", 1024, seed=0): ...        # Float[Tensor, "1024 d_model"], endless

A store is a folder named by its content: the hash of the model's weights, the token ids, the sites and the dtype.
Asking for the same again finds it; a changed model never reads old activations. Layout: `manifest.json` and
`shard-00000.safetensors`, ...; each shard holds, for its tokens, one tensor per site and `ids`, `row`, `pos` (token id,
sequence, position). Padding is left out. The manifest has size and SHA-256 of every shard. A folder is written under a
temporary name and renamed, so a killed run leaves no half store.
Beware: consecutive tokens are correlated, so train on `batches`, and position 0 may be a massive activation
(`norms` shows it; pass `keep` to leave such tokens out).
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from interp.core.errors import ArtefactError, InterpError, unknown
from interp.core.hash import hash_json
from interp.core.manifest import versions
from interp.core.progress import track
from interp.core.seed import torch_generator
from interp.core.sites import Site
from interp.instrument.capture import capture
from interp.instrument.shards import (
    DTYPES,
    FORMAT,
    MANIFEST,
    VERSION,
    check_shards,
    read_manifest,
    write_shard,
)
from interp.instrument.tokens import TokenRecord
from interp.models.model import LoadedModel

TOKEN_COLUMNS = ("ids", "row", "pos")


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """How activations are stored."""

    dtype: str = "float16"
    """float32, float16 or bfloat16; float16 refuses values above 65,504 rather than storing infinity."""
    rows_per_forward: int = 8
    """Sequences per forward pass."""
    shard_tokens: int = 16_384
    """Tokens per shard file, at least; whole forward passes are kept together."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise unknown("store dtype", self.dtype, DTYPES)
        if self.rows_per_forward < 1 or self.shard_tokens < 1:
            raise InterpError("rows_per_forward and shard_tokens must be at least 1")


class ActivationStore:
    """An opened store. Shards are mapped, not loaded: memory is that of the batches read."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.sites: dict[str, tuple[int, ...]] = {name: tuple(shape) for name, shape in manifest["sites"].items()}
        """Site -> shape of one token's activation."""
        self.sizes: list[int] = [int(shard["tokens"]) for shard in manifest["shards"]]
        self.dtype = DTYPES[manifest["dtype"]]

    @classmethod
    def write(
        cls,
        model: LoadedModel,
        record: TokenRecord,
        sites: str | Site | Iterable[str | Site],
        folder: Path | str,
        config: StoreConfig | None = None,
    ) -> ActivationStore:
        """Capture several sites in one pass into `folder/<key>`; a store that already exists is opened instead."""
        config = config or StoreConfig()
        found = model.resolve(sites)
        if model.hub.pending:  # edited activations must not be found later under the untouched model's name
            raise InterpError("a capture or an edit of this model is open; write the store outside it")
        key = store_key(model, record, found, config)
        target = Path(folder) / key
        if (target / MANIFEST).is_file():
            return cls.open(target)
        if target.exists():
            raise ArtefactError(f"{target} exists and is not an activation store; remove it or choose another folder")
        draft = target.with_name(f".{key}.{uuid.uuid4().hex[:8]}")
        try:
            draft.mkdir(parents=True)
            manifest = _capture_into(draft, model, record, found, config, key)
            (draft / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            try:
                draft.rename(target)
            except OSError:
                if not (target / MANIFEST).is_file():  # otherwise another process has just written the same
                    raise
        except (OSError, SafetensorError) as error:
            raise ArtefactError(f"could not write {target}: {error}; free space or choose another folder") from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return cls.open(target)

    @classmethod
    def open(cls, folder: Path | str, *, verify: bool = False) -> ActivationStore:
        """Open a store; file sizes are always checked, checksums with `verify`. ArtefactError names what is wrong."""
        folder = Path(folder)
        manifest = read_manifest(folder)
        check_shards(folder, manifest, checksums=verify)
        return cls(folder, manifest)

    def __len__(self) -> int:
        """Number of tokens."""
        return sum(self.sizes)

    @property
    def key(self) -> str:
        return str(self.manifest["key"])

    @cached_property
    def _shards(self) -> list[dict[str, Tensor]]:
        """Mapped tensors of every shard; pages are read when touched."""
        opened: list[dict[str, Tensor]] = []
        for shard in self.manifest["shards"]:
            path = self.folder / shard["file"]
            try:
                with safe_open(path, framework="pt") as file:
                    opened.append({name: file.get_tensor(name) for name in (*self.sites, *TOKEN_COLUMNS)})
            except (SafetensorError, OSError) as error:
                raise ArtefactError(f"{path} is damaged: {error}") from error
        return opened

    def _known(self, site: str | Site) -> str:
        if str(site) not in self.sites:
            raise unknown("stored site", str(site), self.sites)
        return str(site)

    def tokens(self) -> tuple[Int[Tensor, "n"], Int[Tensor, "n"], Int[Tensor, "n"]]:
        """Token id, sequence and position of every stored token."""
        ids, row, pos = (torch.cat([shard[name] for shard in self._shards]) for name in TOKEN_COLUMNS)
        return ids, row, pos

    def take(self, site: str | Site, index: Int[Tensor, "n"]) -> Float[Tensor, "n *shape"]:
        """Activations of the tokens numbered `index`, in that order."""
        name = self._known(site)
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(self):
            raise InterpError(f"token numbers must lie in 0..{len(self) - 1}")
        out = torch.empty(len(index), *self.sites[name], dtype=self.dtype)
        first = 0
        for shard, size in zip(self._shards, self.sizes, strict=True):
            inside = ((index >= first) & (index < first + size)).nonzero()[:, 0]
            out[inside] = shard[name].index_select(0, index[inside] - first)
            first += size
        return out

    def blocks(self, site: str | Site, batch_size: int = 4096) -> Iterator[Float[Tensor, "batch *shape"]]:
        """Every token once, in order."""
        name = self._known(site)
        for shard in self._shards:
            yield from shard[name].split(_positive(batch_size))

    def norms(self, site: str | Site) -> Float[Tensor, "n"]:
        """Euclidean norm of every token's activation, float32."""
        return torch.cat([block.float().flatten(1).norm(dim=1) for block in self.blocks(site)])

    def batches(
        self,
        site: str | Site,
        batch_size: int,
        *,
        seed: int,
        keep: Bool[Tensor, "n"] | None = None,
        n_epochs: int | None = None,
    ) -> Iterator[Float[Tensor, "batch *shape"]]:
        """Full batches of shuffled tokens, a new order each epoch; endless unless `n_epochs` is given.

        keep: which tokens may be drawn. The tokens left over at the end of an epoch open the next one.
        """
        name = self._known(site)
        if keep is not None and len(keep) != len(self):
            raise InterpError(f"keep has {len(keep)} entries for {len(self)} stored tokens")
        pool = torch.arange(len(self)) if keep is None else keep.nonzero()[:, 0]
        if len(pool) == 0:
            raise InterpError("no token is left to draw; loosen `keep`")
        if len(pool) < _positive(batch_size) and n_epochs is not None:
            raise InterpError(f"batch_size={batch_size} exceeds the {len(pool)} tokens of an epoch; lower it")
        return self._batches(name, batch_size, pool, seed, n_epochs)

    def _batches(
        self, name: str, batch_size: int, pool: Tensor, seed: int, n_epochs: int | None
    ) -> Iterator[Float[Tensor, "batch *shape"]]:
        waiting, epoch = pool[:0], 0
        while n_epochs is None or epoch < n_epochs:
            order = torch.randperm(len(pool), generator=torch_generator(seed, "store", name, epoch))
            waiting, epoch = torch.cat([waiting, pool[order]]), epoch + 1
            while len(waiting) >= batch_size:
                yield self.take(name, waiting[:batch_size])
                waiting = waiting[batch_size:]

    def __repr__(self) -> str:
        return f"ActivationStore({self.key}, {len(self)} tokens, {', '.join(self.sites)}, {self.manifest['dtype']})"


def store_key(model: LoadedModel, record: TokenRecord, sites: list[Site], config: StoreConfig) -> str:
    """Content hash of what the store will hold; how it is cut into shards and forwards does not matter."""
    return hash_json(
        {
            "format": [FORMAT, VERSION],
            "weights": model.weight_hash,
            "model_dtype": str(model.dtype),
            "tokens": record.hash,
            "sites": sorted(map(str, sites)),
            "dtype": config.dtype,
        }
    )


def _positive(batch_size: int) -> int:
    if batch_size < 1:
        raise InterpError(f"batch_size={batch_size} must be at least 1")
    return batch_size


def _capture_into(
    folder: Path, model: LoadedModel, record: TokenRecord, sites: list[Site], config: StoreConfig, key: str
) -> dict[str, Any]:
    shards: list[dict[str, Any]] = []
    shapes: dict[str, list[int]] = {}
    pending: list[dict[str, Tensor]] = []
    starts = range(0, len(record), config.rows_per_forward)
    for start in track(starts, "capturing activations"):
        part = _forward(model, record, sites, start, config)
        shapes = {str(site): list(part[str(site)].shape[1:]) for site in sites}
        pending.append(part)
        if sum(len(p["ids"]) for p in pending) >= config.shard_tokens or start == starts[-1]:
            shards.append(write_shard(folder, len(shards), pending))
            pending = []
    return {
        "format": FORMAT,
        "version": VERSION,
        "key": key,
        "sites": shapes,
        "dtype": config.dtype,
        "tokens": sum(shard["tokens"] for shard in shards),
        "token_hash": record.hash,
        "model": {"source": model.source, "weight_hash": model.weight_hash, "dtype": str(model.dtype)},
        "versions": versions(),
        "shards": shards,
    }


def _forward(
    model: LoadedModel, record: TokenRecord, sites: list[Site], start: int, config: StoreConfig
) -> dict[str, Tensor]:
    """One forward pass: a tensor per site and the token columns, real tokens only."""
    rows = record.rows(slice(start, start + config.rows_per_forward))
    with capture(model, sites) as acts:
        model(rows)
    row, pos = rows.mask.nonzero(as_tuple=True)
    part: dict[str, Tensor] = {"ids": rows.ids[rows.mask], "row": row + start, "pos": pos}
    for site in sites:
        values = acts[site]
        if values.ndim < 3 or values.shape[:2] != rows.ids.shape:
            raise InterpError(f"{site} has shape {tuple(values.shape)}; a store takes sites with axes batch, pos, ...")
        stored = values[rows.mask.to(values.device)].to(device="cpu", dtype=DTYPES[config.dtype])
        if not bool(torch.isfinite(stored).all()):
            raise InterpError(f"{site} does not fit {config.dtype} (or is not finite); store it as bfloat16 or float32")
        part[str(site)] = stored.contiguous()
    return part
