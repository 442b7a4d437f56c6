"""A store: activations of many tokens on disk, written once, read shuffled without loading them all.

    store = ActivationStore.write(model, record, ["resid_post.10"], folder)
    for x in store.batches("resid_post.10", 1024, seed=0): ...        # Float[Tensor, "1024 d_model"], endless

A store is a folder named by its content: the hash of the model's weights, the input, the sites and the dtype. Asking
for the same again finds it; a changed model never reads old activations. Padding is left out. `shards` has the format,
`store_capture` how it survives a kill and how several processes share the work, `store_merge` append and merge,
`store_audit` what can be wrong with a folder. The folder may be a URL that fsspec knows.
Beware: consecutive tokens are correlated, so train on `batches`, and position 0 may be a massive activation
(`norms` and `statistics` show it; pass `keep` to leave such tokens out).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import InterpError, unknown
from interp.core.seed import torch_generator
from interp.core.sites import Site
from interp.instrument.shards import DTYPES, check_shards, read_manifest, scale_name
from interp.instrument.statistics import Statistics
from interp.instrument.store_capture import write_store
from interp.instrument.store_encode import dequantise
from interp.instrument.store_folders import Folder, open_folder
from interp.instrument.store_plan import StoreConfig
from interp.instrument.store_ranks import Ranks
from interp.instrument.store_reader import CACHE_BYTES, CachedColumns, Columns, Kinds, MappedColumns, read_statistics
from interp.instrument.stream import Batches, RecordBatches
from interp.instrument.stream_pass import Observer
from interp.instrument.tokens import TokenRecord
from interp.models.model import LoadedModel

__all__ = ["ActivationStore", "StoreConfig"]


class ActivationStore:
    """An opened store. Shards are mapped, not loaded: memory is that of the batches read.

    A shuffled epoch also holds its order, 8 bytes a token.
    """

    def __init__(self, folder: Folder, manifest: Mapping[str, Any], cache_bytes: int = CACHE_BYTES) -> None:
        self.folder, self.manifest = folder, manifest
        self.sites: dict[str, tuple[int, ...]] = {name: tuple(shape) for name, shape in manifest["sites"].items()}
        """Site -> shape of one token's activation."""
        self.sizes: list[int] = [int(shard["tokens"]) for shard in manifest["shards"]]
        self.dtype = torch.float32 if manifest["dtype"] == "int8" else DTYPES[manifest["dtype"]]
        """Of the values read; int8 is turned back into float32."""
        self.columns = _columns(folder, manifest, self.sizes, cache_bytes)

    @classmethod
    def write(
        cls,
        model: LoadedModel,
        data: TokenRecord | Batches,
        sites: str | Site | Iterable[str | Site],
        folder: Folder | Path | str,
        config: StoreConfig | None = None,
        *,
        ranks: Ranks | None = None,
        observers: Sequence[Observer] = (),
    ) -> ActivationStore:
        """Capture several sites in one pass into `folder/<key>`; a store that already exists is opened instead.

        Run again after a kill, it writes the shards that are missing. Under torchrun each process calls this, and each
        gets the finished store.

        observers: see every batch in the same pass, see `stream_pass`.
        """
        config = config or StoreConfig()
        found = model.resolve(sites)
        if not found:
            raise InterpError("no sites were asked for; model.sites() lists them")
        batches = RecordBatches(data, config.rows_per_forward) if isinstance(data, TokenRecord) else data
        where, ranks = open_folder(folder), ranks or Ranks.current()
        return cls.open(write_store(model, batches, found, where, config, ranks, observers))

    @classmethod
    def open(
        cls, folder: Folder | Path | str, *, verify: bool = False, cache_bytes: int = CACHE_BYTES
    ) -> ActivationStore:
        """Open a store; file sizes are always checked, checksums with `verify`. ArtefactError names what is wrong.

        cache_bytes: memory for the shards of a remote folder.
        """
        where = open_folder(folder)
        manifest = read_manifest(where)
        check_shards(where, manifest, checksums=verify)
        return cls(where, manifest, cache_bytes)

    def __len__(self) -> int:
        """Number of tokens."""
        return sum(self.sizes)

    @property
    def key(self) -> str:
        return str(self.manifest["key"])

    def _known(self, site: str | Site) -> str:
        if str(site) not in self.sites:
            raise unknown("stored site", str(site), self.sites)
        return str(site)

    def tokens(self) -> tuple[Int[Tensor, " n"] | None, Int[Tensor, " n"], Int[Tensor, " n"]]:
        """Token id (None where the input was no text), sequence and position of every stored token."""
        offsets = [int(shard["row_offset"]) for shard in self.manifest["shards"]]
        n = range(len(self.sizes))
        row = torch.cat([self.columns.block("row", i) + offsets[i] for i in n])
        pos = torch.cat([self.columns.block("pos", i) for i in n])
        ids = torch.cat([self.columns.block("ids", i) for i in n]) if "ids" in self.manifest["columns"] else None
        return ids, row, pos

    def take(self, site: str | Site, index: Int[Tensor, " n"]) -> Float[Tensor, "n *shape"]:
        """Activations of the tokens numbered `index`, in that order."""
        name = self._known(site)
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(self):
            raise InterpError(f"token numbers must lie in 0..{len(self) - 1}")
        return self._take(name, index)

    def _take(self, name: str, index: Tensor) -> Tensor:
        values = self.columns.gather(name, index)
        return (
            values if values.dtype == self.dtype else dequantise(values, self.columns.gather(scale_name(name), index))
        )

    def blocks(self, site: str | Site, batch_size: int = 4096) -> Iterator[Float[Tensor, "batch *shape"]]:
        """Every token once, in order."""
        name = self._known(site)
        _positive(batch_size)
        for shard in range(len(self.sizes)):
            values = self.columns.block(name, shard).split(batch_size)
            if self.manifest["dtype"] != "int8":
                yield from values
                continue
            scales = self.columns.block(scale_name(name), shard).split(batch_size)
            yield from (dequantise(*pair) for pair in zip(values, scales, strict=True))

    def norms(self, site: str | Site) -> Float[Tensor, " n"]:
        """Euclidean norm of every token's activation, float32."""
        return torch.cat([block.float().flatten(1).norm(dim=1) for block in self.blocks(site)])

    def statistics(self, site: str | Site) -> Statistics:
        """What was gathered of a site while it was written: mean, variance, norms, kurtosis, largest value."""
        name, file = self._known(site), self.manifest["statistics"]["file"]
        return read_statistics(self.folder, file, [name])[name][0]

    @overload
    def batches(
        self, site: str | Site, batch_size: int, *, seed: int, keep: Bool[Tensor, " n"] | None = None,
        n_epochs: int | None = None, reader: int = 0, n_readers: int = 1,
    ) -> Iterator[Float[Tensor, "batch *shape"]]: ...  # fmt: skip
    @overload
    def batches(
        self, site: Sequence[str | Site], batch_size: int, *, seed: int, keep: Bool[Tensor, " n"] | None = None,
        n_epochs: int | None = None, reader: int = 0, n_readers: int = 1,
    ) -> Iterator[dict[str, Tensor]]: ...  # fmt: skip
    def batches(
        self,
        site: str | Site | Sequence[str | Site],
        batch_size: int,
        *,
        seed: int,
        keep: Bool[Tensor, " n"] | None = None,
        n_epochs: int | None = None,
        reader: int = 0,
        n_readers: int = 1,
    ) -> Iterator[Tensor] | Iterator[dict[str, Tensor]]:
        """Full batches of shuffled tokens, a new order each epoch; endless unless `n_epochs` is given.

        site: one, or a list for batches of the same tokens as a dict by name.
        keep: which tokens may be drawn. The tokens left over at the end of an epoch open the next one.
        reader, n_readers: of the one order that the seed stands for, this reader takes batches reader, reader +
        n_readers, ...; together the readers see each batch once.
        """
        names = [self._known(name) for name in ([site] if isinstance(site, str | Site) else site)]
        if not names:
            raise InterpError("no sites were asked for; store.sites lists them")
        if keep is not None and len(keep) != len(self):
            raise InterpError(f"keep has {len(keep)} entries for {len(self)} stored tokens")
        if not 0 <= reader < n_readers:
            raise InterpError(f"reader {reader} of {n_readers}; readers run from 0 to {n_readers - 1}")
        pool = torch.arange(len(self)) if keep is None else keep.nonzero()[:, 0]
        if len(pool) == 0:
            raise InterpError("no token is left to draw; loosen `keep`")
        if len(pool) < _positive(batch_size) and n_epochs is not None:
            raise InterpError(f"batch_size={batch_size} exceeds the {len(pool)} tokens of an epoch; lower it")
        drawn = _every(shuffled(pool, batch_size, seed, n_epochs), reader, n_readers)
        if isinstance(site, str | Site):
            return (self._take(names[0], index) for index in drawn)
        return ({name: self._take(name, index) for name in names} for index in drawn)

    def __repr__(self) -> str:
        return f"ActivationStore({self.key}, {len(self)} tokens, {', '.join(self.sites)}, {self.manifest['dtype']})"


def shuffled(
    pool: Int[Tensor, " n"], batch_size: int, seed: int, n_epochs: int | None
) -> Iterator[Int[Tensor, " batch"]]:
    """Token numbers of each batch: the order depends on the seed and the pool alone."""
    waiting, epoch = pool[:0], 0
    while n_epochs is None or epoch < n_epochs:
        order = torch.randperm(len(pool), generator=torch_generator(seed, "store", epoch))
        waiting, epoch = torch.cat([waiting, pool[order]]), epoch + 1
        n_full = len(waiting) // batch_size
        yield from waiting[: n_full * batch_size].view(n_full, batch_size)
        waiting = waiting[n_full * batch_size :]


def _every(batches: Iterator[Tensor], first: int, step: int) -> Iterator[Tensor]:
    return (batch for number, batch in enumerate(batches) if number % step == first)


def _positive(batch_size: int) -> int:
    if batch_size < 1:
        raise InterpError(f"batch_size={batch_size} must be at least 1")
    return batch_size


def _columns(folder: Folder, manifest: Mapping[str, Any], sizes: Sequence[int], cache_bytes: int) -> Columns:
    dtype = DTYPES[manifest["dtype"]]
    kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = dict.fromkeys(manifest["columns"], (torch.int64, ()))
    kinds |= {site: (dtype, tuple(shape)) for site, shape in manifest["sites"].items()}
    if manifest["dtype"] == "int8":
        kinds |= {scale_name(site): (torch.float32, ()) for site in manifest["sites"]}
    files = [str(shard["file"]) for shard in manifest["shards"]]
    known: Kinds = kinds
    if folder.local is None:
        return CachedColumns(folder, files, sizes, known, cache_bytes)
    return MappedColumns(folder, files, sizes, known)
