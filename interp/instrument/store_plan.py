"""What a capture is going to write, fixed before the first shard: the plan of a store.

Shard s holds the batches [s m, (s + 1) m). Its bytes follow from the model, the input, the cut into batches and m, so
any process can write it at any time. m is the largest number of batches that stays within `shard_tokens` tokens and
`shard_bytes` bytes by the size of an average batch, and at least 1.

The plan lies in the folder from the start and stays. A capture that finds one without a manifest goes on with it: it
takes the plan's m (which changes no value), and refuses another cut into batches or other library versions (which
change last bits).
Trap: on some machines the number of threads changes the last bits of a matrix product. torchrun gives each process one
thread unless OMP_NUM_THREADS says otherwise; keep the number the same if you need the same bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from interp.core.errors import ArtefactError, InterpError, unknown
from interp.core.hash import hash_json
from interp.core.manifest import versions
from interp.core.sites import Site
from interp.instrument.shards import DTYPES, FORMAT, PLAN, VERSION
from interp.instrument.store_encode import Encoded
from interp.instrument.store_folders import Folder
from interp.instrument.store_writer import as_json, sha256
from interp.instrument.stream import Batches
from interp.models.model import LoadedModel


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """How activations are stored."""

    dtype: str = "float16"
    """float32, float16, bfloat16 or int8; float16 refuses values above 65,504 rather than storing infinity."""
    rows_per_forward: int = 8
    """Sequences per forward pass, where the input is a token record; other inputs come cut into batches."""
    shard_tokens: int = 16_384
    """Tokens per shard file, about and at most; whole forward passes are kept together."""
    shard_bytes: int = 256 << 20
    """Bytes per shard file, about and at most: two shards are held in memory while capturing."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise unknown("store dtype", self.dtype, DTYPES)
        if self.rows_per_forward < 1 or self.shard_tokens < 1 or self.shard_bytes < 1:
            raise InterpError("rows_per_forward, shard_tokens and shard_bytes must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The content of plan.json."""

    key: str
    sites: dict[str, list[int]]
    """Site -> shape of one token's activation."""
    columns: list[str]
    dtype: str
    input_hash: str
    cut: str
    n_batches: int
    n_tokens: int | None
    batches_per_shard: int
    model: dict[str, str]
    versions: dict[str, str]
    format: str = FORMAT
    version: int = VERSION

    @property
    def n_shards(self) -> int:
        return -(-self.n_batches // self.batches_per_shard)

    def batches_of(self, shard: int) -> range:
        first = shard * self.batches_per_shard
        return range(first, min(first + self.batches_per_shard, self.n_batches))

    def write(self, folder: Folder) -> None:
        content = {**asdict(self), "n_shards": self.n_shards}
        folder.write(PLAN, [as_json({**content, "checksum": sha256([as_json(content)])})])

    @classmethod
    def read(cls, folder: Folder) -> Plan | None:
        """The plan in a folder, None where there is none."""
        if not folder.exists(PLAN):
            return None
        try:
            raw: dict[str, Any] = json.loads(folder.read(PLAN))
            if (raw["format"], raw["version"]) != (FORMAT, VERSION):
                raise ArtefactError(f"{folder / PLAN} is of another release; delete {folder} and capture again")
            if raw.pop("checksum", None) != sha256([as_json(raw)]):
                raise ArtefactError(
                    f"{folder / PLAN} was changed after it was written; delete {folder} and capture again"
                )
            raw.pop("n_shards")
            return cls(**raw)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ArtefactError):
                raise
            raise ArtefactError(f"{folder / PLAN} is damaged: {error}; delete {folder} and capture again") from error

    def go_on(self, fresh: Plan, folder: Folder) -> Plan:
        """This plan, found in the folder, where `fresh` is what would be planned now."""
        begun = f"{folder} was begun with"
        ending = f"to go on, or delete {folder}"
        if (self.cut, self.n_batches) != (fresh.cut, fresh.n_batches):
            raise ArtefactError(f"{begun} {self.cut}; this is {fresh.cut}: take the same {ending}")
        for name in ("torch", "transformers"):
            if self.versions.get(name) != fresh.versions.get(name):
                now = f"{name} {fresh.versions.get(name)}"
                raise ArtefactError(f"{begun} {name} {self.versions.get(name)}, this is {now}: take the same {ending}")
        if replace(self, batches_per_shard=1, versions={}, model={}) != replace(
            fresh, batches_per_shard=1, versions={}, model={}
        ):
            raise ArtefactError(f"{folder / PLAN} is the plan of another capture; delete {folder} and capture again")
        return self


def store_key(model: LoadedModel, batches: Batches, sites: Sequence[Site], dtype: str) -> str:
    """Content hash of what the store will hold; how it is cut into shards and forwards does not matter."""
    return hash_json(
        {
            "format": [FORMAT, VERSION],
            "weights": model.weight_hash,
            "config": model.config_hash,
            "model_dtype": str(model.dtype),
            "tokens": batches.hash,
            "sites": sorted(map(str, sites)),
            "dtype": dtype,
        }
    )


def _names(model: LoadedModel) -> dict[str, str]:
    return {"weight_hash": model.weight_hash, "config_hash": model.config_hash}


def make_plan(model: LoadedModel, batches: Batches, trial: Encoded, config: StoreConfig, key: str) -> Plan:
    """From the first batch, already run: it tells the shapes and what a token weighs."""
    n_first = max(1, len(trial.columns["row"]))
    mean = n_first if batches.n_tokens is None else max(1, math.ceil(batches.n_tokens / batches.n_batches))
    n_bytes = max(1, math.ceil(trial.n_bytes * mean / n_first))
    return Plan(
        key=key,
        sites={site: list(shape) for site, shape in trial.shapes.items()},
        columns=[name for name in ("ids", "row", "pos") if name in trial.columns],
        dtype=config.dtype,
        input_hash=batches.hash,
        cut=batches.cut,
        n_batches=batches.n_batches,
        n_tokens=batches.n_tokens,
        batches_per_shard=max(1, min(config.shard_tokens // mean, config.shard_bytes // n_bytes)),
        model={"source": model.source, "dtype": str(model.dtype), **_names(model)},
        versions=versions(),
    )
