"""What GLU neurons write and look for, read through the unembedding: weights alone (a helper of `glu_neurons`).

Neuron j of a layer adds hidden_j * W_down[j] to the stream, hidden_j = act(W_gate[:, j] . x) * (W_up[:, j] . x).
    writes    logits of W_down[j], folded with the final norm's gain; kurtosis says how sharp they are (0: like noise)
    looks for logits of W_gate[:, j] and W_up[:, j], folded with the gain of the norm before the MLP
    geometry  cosines between gate, up and value vector
Source: J. Lee et al., The geometry of self-verification in a task-specific reasoning model, 2025,
https://arxiv.org/abs/2504.14379. Ungated MLPs have one reading vector, `in`.
Beware: a vector in the middle of a model is read as if nothing came after it; the scale of the final norm is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp.analyses.heads_weights import Fold, fold_after, fold_before
from interp.core.errors import InterpError
from interp.core.progress import track
from interp.core.sites import Part
from interp.models.model import LoadedModel

BLOCK = 256
"""Neurons read at once: the vocabulary is wide."""
N_TOKENS = 6
"""Tokens shown for each reading."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Mlp:
    """The vectors of one layer's neurons, in the units of the stream (norms' gains folded in), float64."""

    layer: int
    readers: dict[str, Float[Tensor, "neuron d_model"]]
    """`gate` and `up`, or `in`."""
    values: Float[Tensor, "neuron d_model"]
    raw: dict[str, Float[Tensor, "neuron d_model"]]
    """The same without the gains, and `down`: as they stand in the weights."""


def mlp_layers(model: LoadedModel) -> list[int]:
    """Layers with a dense MLP."""
    return [
        layer
        for layer in range(model.n_layers)
        if model.table.has_weight("W_down", layer) and any(model.table.has_weight(n, layer) for n in ("W_gate", "W_in"))
    ]


def read_mlp(model: LoadedModel, layer: int) -> Mlp:
    """The vectors of a layer."""
    names = {"gate": "W_gate", "up": "W_up"} if model.table.has_weight("W_gate", layer) else {"in": "W_in"}
    raw = {name: model.weight(weight, layer).detach().double().cpu().T for name, weight in names.items()}
    down = model.weight("W_down", layer).detach().double().cpu()
    before, after = fold_before(model, Part.MLP_IN, layer), fold_after(model, Part.MLP_OUT, layer)
    return Mlp(
        layer=layer,
        readers={name: before.back(weight) for name, weight in raw.items()},
        values=after(down),
        raw=raw | {"down": down},
    )


def activation(model: LoadedModel, layer: int) -> Any:
    """The MLP's non-linearity."""
    path = model.table.family.act if model.table.family else None
    if path is None:
        raise InterpError(f"{model.source} names no non-linearity of its MLPs; its neurons cannot be read")
    return model.module.get_submodule(path.format(layer=layer)).forward


def unembedding(model: LoadedModel) -> tuple[Float[Tensor, "d_model vocab"], Fold]:
    """W_U behind the final norm's linear part."""
    return model.weight("W_U").detach(), fold_before(model, Part.FINAL_NORM, None)


def token_logits(model: LoadedModel, vectors: Float[Tensor, "n d_model"]) -> Float[Tensor, "n vocab"]:
    """What directions of the stream would do to the logits, up to scale."""
    weight, final = unembedding(model)
    return final(vectors).to(weight) @ weight


def sharpness(model: LoadedModel, mlp: Mlp) -> Float[Tensor, " neuron"]:
    """Excess kurtosis over the vocabulary of what each neuron writes."""
    found: list[Tensor] = []
    for start in range(0, len(mlp.values), BLOCK):
        logits = token_logits(model, mlp.values[start : start + BLOCK])
        centred = logits - logits.mean(1, keepdim=True)
        square = centred.square()
        found.append((square.square().mean(1) / square.mean(1).square().clamp_min(1e-30) - 3).double().cpu())
    return torch.cat(found)


def geometry(mlp: Mlp) -> pd.DataFrame:
    """Cosines between the vectors of each neuron, as they stand in the weights."""
    names = list(mlp.raw)
    table: dict[str, Any] = {"layer": mlp.layer, "neuron": range(len(mlp.values))}
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            table[f"cos_{first}_{second}"] = torch.cosine_similarity(mlp.raw[first], mlp.raw[second], dim=1).tolist()
    return pd.DataFrame(table)


def scan(model: LoadedModel, layers: Sequence[int]) -> pd.DataFrame:
    """Geometry of every neuron of the model, and the sharpness of those of some layers (NaN elsewhere)."""
    parts: list[pd.DataFrame] = []
    for layer in track(mlp_layers(model), "reading neurons through the unembedding"):
        mlp = read_mlp(model, layer)
        table = geometry(mlp)
        parts.append(table.assign(kurtosis=sharpness(model, mlp).tolist() if layer in layers else float("nan")))
    table = pd.concat(parts, ignore_index=True)
    names = [f"{layer}.{neuron}" for layer, neuron in zip(table["layer"], table["neuron"], strict=True)]
    return table.assign(name=names)


def readings(model: LoadedModel, chosen: pd.DataFrame) -> pd.DataFrame:
    """The chosen neurons with the tokens that they write and look for."""
    rows: list[dict[str, Any]] = []
    for record in chosen.to_dict("records"):
        mlp, neuron = read_mlp(model, int(record["layer"])), int(record["neuron"])
        vectors = {"writes": mlp.values[neuron], **{f"{n} reads": v[neuron] for n, v in mlp.readers.items()}}
        logits = token_logits(model, torch.stack(list(vectors.values())))
        tokens = {
            name: " ".join(repr(_token(model, i)) for i in row.topk(N_TOKENS).indices.tolist())
            for name, row in zip(vectors, logits, strict=True)
        }
        rows.append({str(key): value for key, value in record.items()} | tokens)
    return pd.DataFrame(rows)


def _token(model: LoadedModel, token: int) -> str:
    return str(token) if model.tokenizer is None else model.tokenizer.decode([token])
