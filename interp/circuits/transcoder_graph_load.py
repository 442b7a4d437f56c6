"""Transcoders for a graph: read from a folder, or trained small and quickly for layers that have none.

A folder is circuit-tracer's (one file per layer, or a cross-layer transcoder) or holds saved dictionaries `layer_<i>/`.
The site each was trained on is read from its description: mlp_in (the normed input) unless it says resid_mid.
`train_small` trains one transcoder per layer on the same pass over a corpus, and random features with the best readout
beside each; both are kept in a folder named after model, text and settings, and read back the next time.
Trap: a few hundred steps make a usable example, not good transcoders; the graph's error nodes say how much is missing.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp.circuits.transcoder_graph_frozen import Frozen
from interp.circuits.transcoder_graph_layers import Read, Replacement, Stand, activate, read_by, replacement
from interp.core.errors import ArtefactError, InterpError
from interp.core.hash import hash_json
from interp.core.seed import torch_generator
from interp.dictionaries.activations.topk import TopK
from interp.dictionaries.dictionary import SparseDictionary
from interp.dictionaries.formats import circuit_tracer
from interp.dictionaries.formats.cross_layer import read_clt
from interp.dictionaries.saved import DESCRIPTION, SavedDictionary, load, save
from interp.dictionaries.sinks import ordinary
from interp.dictionaries.train import train_transcoder
from interp.dictionaries.train_config import TrainConfig
from interp.dictionaries.transcoder_baselines import random_features
from interp.instrument.store import ActivationStore, StoreConfig
from interp.instrument.tokens import TokenRecord
from interp.models.model import LoadedModel

SAMPLE = 32_768
"""Tokens from which scales and the readout of random features are taken."""


@dataclass(frozen=True, kw_only=True)
class SmallConfig:
    """How to train a small transcoder per layer."""

    d_dict: int = 1536
    """Number of latents."""
    k: int = 24
    """Active latents per token."""
    n_steps: int = 300
    """Optimiser steps."""
    batch_size: int = 1024
    """Tokens per step."""
    lr: float = 2e-3
    """Peak learning rate."""
    skip: bool = False
    """Add a linear path beside the features."""
    drop_norm: float = 10.0
    """Leave out position 0 and tokens above this multiple of the median norm; 0 keeps all."""
    seed: int = 0
    """First directions and order of the tokens."""


def read_replacement(folder: Path | str) -> Replacement:
    """The transcoders of a folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ArtefactError(f"{folder} is no folder of transcoders")
    if circuit_tracer.is_cross_layer(folder):
        clt, config = read_clt(folder)
        return replacement(clt, read=_read(config.get("feature_input_hook")))
    saved: Mapping[int, SavedDictionary] = circuit_tracer.read_set(folder) or {
        int(own.name.removeprefix("layer_")): load(own)
        for own in sorted(folder.glob("layer_*"))
        if (own / DESCRIPTION).is_file() and own.name.removeprefix("layer_").isdigit()
    }
    if not saved:
        raise ArtefactError(
            f"{folder} holds no transcoders: expected layer_<i>.safetensors or W_enc_<i>.safetensors (circuit-tracer), "
            "or saved dictionaries in folders layer_<i>"
        )
    reads: set[Read] = {_read(own.about.get("site")) for own in saved.values()}
    if len(reads) != 1:
        raise ArtefactError(f"{folder}: its transcoders read different sites, {sorted(reads)}")
    return replacement({layer: own.dictionary for layer, own in saved.items()}, read=reads.pop())


def _read(hook: Any) -> Read:
    return "resid_mid" if "resid_mid" in str(hook or "") else "mlp_in"


@torch.no_grad()
def random_like(replaced: Replacement, frozen: Frozen, *, seed: int) -> Replacement:
    """The same sizes and the same number of active features on this prompt, all directions random: a control.

    Encoder and decoder rows keep their mean norms; inputs are centred on the prompt's mean.
    """
    active = activate(frozen, replaced)
    stands: list[Stand] = []
    for stand in replaced.stands:
        own, n = stand.dictionary, len(active.where(stand.layer))
        k = min(max(round(n / max(frozen.n_pos - 1, 1)), 1), own.d_dict)
        made = SparseDictionary(own.d_in, own.d_dict, TopK(k), d_out=own.d_out, dtype=own.W_enc.dtype)
        generator = torch_generator(seed, "random-like", stand.layer)
        for weight, like, dim in ((made.W_enc, own.W_enc, 0), (made.W_dec, own.W_dec, 1)):
            drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight.dtype)
            weight.copy_(drawn / drawn.norm(dim=dim, keepdim=True) * like.norm(dim=dim).mean())
        made.b_enc.copy_(-read_by(frozen, stand).mean(0).to(made.W_enc.dtype) @ made.W_enc)
        stands.append(dataclasses.replace(stand, dictionary=made.requires_grad_(False)))
    return Replacement(stands=tuple(stands))


def train_small(
    model: LoadedModel, record: TokenRecord, layers: tuple[int, ...], cfg: SmallConfig, folder: Path | None = None
) -> tuple[Replacement, Replacement]:
    """A transcoder for each layer, and random features with the best readout; kept in `folder` where one is given."""
    if not layers:
        raise InterpError("no layers to train transcoders for were given")
    key = hash_json({"weights": model.weight_hash, "text": record.hash, **dataclasses.asdict(cfg)})[:16]
    found: dict[str, dict[int, SparseDictionary]] = {"trained": {}, "random": {}}
    missing: dict[int, dict[str, Path]] = {}
    for layer in layers:
        places = {} if folder is None else {name: folder / key / name / f"layer_{layer}" for name in found}
        if places and all((place / DESCRIPTION).is_file() for place in places.values()):
            for name, place in places.items():
                found[name][layer] = load(place).dictionary
            continue
        missing[layer] = places
    for layer, made in _train(model, record, list(missing), cfg):
        for (name, own), dictionary in zip(found.items(), made, strict=True):
            own[layer] = dictionary
            if missing[layer]:
                about = {"model": model.source, "weight_hash": model.weight_hash, "site": f"mlp_in.{layer}",
                         "target_site": f"mlp_out.{layer}", **dataclasses.asdict(cfg)}  # fmt: skip
                missing[layer][name].parent.mkdir(parents=True, exist_ok=True)
                save(SavedDictionary(dictionary=dictionary, about=about, certificate=None), missing[layer][name])
    return replacement(found["trained"]), replacement(found["random"])


def _train(
    model: LoadedModel, record: TokenRecord, layers: list[int], cfg: SmallConfig
) -> Iterator[tuple[int, tuple[SparseDictionary, SparseDictionary]]]:
    """Transcoder and random features of each layer, from one pass over the text."""
    if not layers:
        return
    pairs = {i: (str(model.table.one(f"mlp_in.{i}")), str(model.table.one(f"mlp_out.{i}"))) for i in layers}
    with tempfile.TemporaryDirectory() as scratch:
        sites = [site for pair in pairs.values() for site in pair]
        store = ActivationStore.write(model, record, sites, Path(scratch), StoreConfig(dtype="float16"))
        for layer, (read, write) in pairs.items():
            yield layer, _train_one(store, record, read, write, cfg)


def _train_one(
    store: ActivationStore, record: TokenRecord, read: str, write: str, cfg: SmallConfig
) -> tuple[SparseDictionary, SparseDictionary]:
    keep = torch.ones(len(store), dtype=torch.bool)
    if cfg.drop_norm:
        for site in (read, write):
            keep &= ordinary(store.norms(site)[:, None], cfg.drop_norm)
        _, row, pos = store.tokens()
        keep &= pos != record.first[row]
    n_kept = int(keep.sum())
    if n_kept <= cfg.k:
        raise InterpError(f"{n_kept} training tokens are left for {read}; use more text")

    def batches(size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in store.batches([read, write], size, seed=cfg.seed, keep=keep):
            yield batch[read].float(), batch[write].float()

    x, y = next(batches(min(n_kept, SAMPLE)))
    train_cfg = TrainConfig(
        d_dict=cfg.d_dict, k=cfg.k, n_steps=cfg.n_steps, batch_size=cfg.batch_size, lr=cfg.lr, seed=cfg.seed,
        skip=cfg.skip, dead_after_tokens=record.n_tokens,
    )  # fmt: skip
    trained = train_transcoder(batches(cfg.batch_size), (x, y), train_cfg).sae
    return trained, random_features(x, y, cfg.d_dict, cfg.k, seed=cfg.seed)
