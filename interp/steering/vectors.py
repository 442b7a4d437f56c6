"""Steering vectors as files: a vector is of use only with its site, sign, unit, positions and model beside it.

One safetensors file holds the unit vector, and as JSON in its header everything that is needed to apply it. The amount
added is `strength * norm * vector`: strength 0.3 moves a typical token of that site by 30 % of its norm.
"""

from __future__ import annotations

import dataclasses
import json
import os
import uuid
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from interp.core.errors import ArtefactError, InterpError
from interp.core.hash import hash_json
from interp.core.result import Result
from interp.instrument.edits import Context, Edit
from interp.instrument.tokens import TokenRecord, residual_norms
from interp.models.model import LoadedModel
from interp.steering.directions import direction, read_last
from interp.steering.evaluate import steerable
from interp.tasks.sentiment import ContrastPairs

FORMAT = 1
_KEY = "interp.steering"
OnMismatch = Literal["error", "warn", "ignore"]


@dataclass(frozen=True, kw_only=True, eq=False)
class SteeringVector:
    """A direction and what is needed to apply it as it was meant."""

    vector: Float[Tensor, " d_model"]
    """Unit length; adding it moves towards `sign`."""
    site: str
    sign: str
    """What a positive strength does, in words."""
    norm: float
    """Median norm of the stream at this site, sinks left out: the unit of strength."""
    strength: float
    """Recommended multiple of `norm`."""
    difference_norm: float
    """Norm of the raw mean difference, for comparison with vectors that are given unscaled."""
    method: str
    read_at: str = "last token"
    positions: str = "all but the first token and attention-sink candidates; every generated token"
    """Where it is meant to be added."""
    source: str
    weight_hash: str
    """Which model it was made on."""
    n_pairs: int
    pairs_hash: str

    def __post_init__(self) -> None:
        if self.vector.ndim != 1 or not bool(torch.isfinite(self.vector).all()):
            raise InterpError(f"a steering vector is one row of finite numbers, got shape {tuple(self.vector.shape)}")

    def scaled(self, strength: float | None = None) -> Float[Tensor, " d_model"]:
        """The vector as it is added."""
        return self.vector * self.norm * (self.strength if strength is None else strength)

    def edit(self, model: LoadedModel, strength: float | None = None, *, record: TokenRecord | None = None) -> Edit:
        """The edit that steers: `with edited(model, vector.edit(model)): model.generate(...)`.

        With the prompts' `record`, padding and sinks are left out by position; without, only the first column is.
        Tokens that are generated are always steered; pass scope="prompt" or "new" to `edited` for less.
        """
        change = self.scaled(strength)
        keep = None if record is None else steerable(model, record)

        def function(x: Tensor, context: Context) -> Tensor:
            if keep is None:
                chosen = (context.where > 0)[None].expand(x.shape[0], -1)
            else:
                inside = keep[:, context.where.clamp_max(keep.shape[1] - 1)]
                chosen = inside | (context.where >= keep.shape[1])
            return x + chosen[..., None].to(x) * change.to(x)

        return Edit(self.site, function, label=f"steer {self.sign}")

    def check(self, model: LoadedModel, on_mismatch: OnMismatch = "error") -> None:
        """Whether this is the model it was made on. A wrong width or a missing site is always an error."""
        model.resolve(self.site)
        if model.dims.d_model != len(self.vector):
            raise InterpError(
                f"the vector has {len(self.vector)} coordinates, {model.source} has d_model={model.dims.d_model}"
            )
        if on_mismatch == "ignore" or model.weight_hash == self.weight_hash:
            return
        text = (
            f"the vector was made on {self.source} with weights {self.weight_hash}, this is {model.source} with "
            f"{model.weight_hash}: its effect is not what was measured"
        )
        if on_mismatch == "error":
            raise InterpError(f"{text}; pass on_mismatch='warn' to use it all the same")
        warnings.warn(text, stacklevel=2)

    def save(self, path: Path) -> Path:
        """Write one safetensors file, whole or not at all."""
        facts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "vector"}
        header = {_KEY: json.dumps({"format": FORMAT, **facts}, allow_nan=False)}
        draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"vector": self.vector.detach().float().cpu().contiguous()}, draft, metadata=header)
            os.replace(draft, path)
        except (OSError, SafetensorError) as error:
            raise ArtefactError(f"could not write {path}: {error}; free space or choose another path") from error
        finally:
            draft.unlink(missing_ok=True)
        return path


def load_vector(path: Path, model: LoadedModel | None = None, *, on_mismatch: OnMismatch = "error") -> SteeringVector:
    """Read a steering vector and, given a model, check that it was made on it."""
    if not path.is_file():
        raise ArtefactError(f"no steering vector at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            raw: dict[str, Any] = json.loads((file.metadata() or {})[_KEY])
            tensor: Tensor = file.get_tensor("vector")
        if raw.pop("format") != FORMAT:
            raise ArtefactError(f"{path} has another format than {FORMAT}; make it again with this version")
        vector = SteeringVector(vector=tensor, **raw)
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError, OSError) as error:
        raise ArtefactError(f"{path} is damaged or not a steering vector: {type(error).__name__}: {error}") from error
    if model is not None:
        vector.check(model, on_mismatch)
    return vector


def from_result(result: Result, sign: str = "positive") -> SteeringVector:
    """The vector that a steering run chose, ready to be saved and applied."""
    if result.method != "steering":
        raise InterpError(f"a result of {result.method!r} holds no steering vector; pass one of steering")
    head, data, site = result.headline, result.manifest.data, str(result.headline["site"])
    layers = result.tables["layers"].set_index("layer")
    return SteeringVector(
        vector=result.tensors["vector"].values,
        site=site,
        sign=sign,
        norm=float(head["activation_norm"]),
        strength=float(head["strength"]),
        difference_norm=float(layers.loc[int(site.rpartition(".")[2]), "relative_norm"])
        * float(head["activation_norm"]),
        method=str(result.manifest.config["method"]),
        source=result.manifest.model.source,
        weight_hash=result.manifest.model.weight_hash,
        n_pairs=int(data["pairs"]),
        pairs_hash=str(data["pairs_hash"]),
    )


def typical_norm(model: LoadedModel, record: TokenRecord, layers: list[int]) -> Float[Tensor, " layer"]:
    """Median norm of the stream after each of some blocks, over the tokens that may be steered."""
    where = steerable(model, record)
    return torch.stack([norms[where].median() for norms in residual_norms(model, record, layers)])


def extract(
    model: LoadedModel,
    pairs: ContrastPairs,
    layer: int,
    *,
    neutral: TokenRecord,
    method: str = "mean",
    strength: float = 0.3,
    sign: str = "positive",
) -> SteeringVector:
    """The direction of contrast pairs at one layer, in units of the norm on `neutral` text."""
    site = str(model.table.one(f"resid_post.{layer}"))
    positive, negative = (read_last(model, side, [layer])[0] for side in (pairs.positive, pairs.negative))
    raw = direction(positive - negative, method)
    return SteeringVector(
        vector=raw / raw.norm(),
        site=site,
        sign=sign,
        norm=float(typical_norm(model, neutral, [layer])[0]),
        strength=strength,
        difference_norm=float(raw.norm()),
        method=method,
        source=model.source,
        weight_hash=model.weight_hash,
        n_pairs=len(pairs.positive),
        pairs_hash=hash_json([pairs.positive, pairs.negative]),
    )
