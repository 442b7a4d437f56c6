"""The steps of the `codebook` method: learn codes and their baselines, look for patterns, patch codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from interp.core.errors import InterpError, SiteError
from interp.core.seed import torch_generator
from interp.core.sites import Site
from interp.dictionaries.base import Dictionary
from interp.dictionaries.baselines import ZeroDictionary
from interp.dictionaries.codebook import Codebook
from interp.dictionaries.codebook_config import CodebookConfig
from interp.dictionaries.codebook_quantise import Quantiser
from interp.dictionaries.codebook_search import Coded, Match, encoded, find, matching
from interp.dictionaries.codebook_steer import Steering, draw_codes, followers, steer
from interp.dictionaries.codebook_train import TrainedCodebooks, train_in_model, train_on_activations
from interp.dictionaries.heldout import HeldOut
from interp.dictionaries.sinks import ordinary
from interp.dictionaries.splice import n_predicted, spliced_losses
from interp.instrument.capture import capture
from interp.instrument.store import ActivationStore
from interp.instrument.tokens import TokenRecord, from_ids
from interp.models.model import LoadedModel

SAMPLE = 16_384
"""Training activations that set the normalisation and the first codes, at most."""
DROP_NORM = 10.0
"""Position 0, and tokens whose norm exceeds this multiple of the median, keep their own activation."""
STEERED, FOLLOWERS = 12, 10
"""Codes that are steered, as many random ones, and next tokens that stand for each."""
CAPTURED = 8
"""Sequences per forward while neurons are captured."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Learned:
    """What training left behind."""

    trained: TrainedCodebooks
    model: LoadedModel
    """The model the codes belong to."""
    plain: LoadedModel | None
    """finetune: the model finetuned as long without codes."""
    dictionaries: dict[str, Dictionary]
    median: float

    @property
    def codebook(self) -> Codebook:
        return next(iter(self.trained.codebooks.values()))


def learn_codes(
    model: LoadedModel, record: TokenRecord, store: ActivationStore, site: Site, cfg: CodebookConfig, *, finetune: bool
) -> Learned:
    """Codes and their baselines: on stored activations where cfg.task is none, else in the model."""
    shape = store.sites[str(site)]
    if len(shape) not in (1, 2):
        raise InterpError(f"{site} has shape {shape} per token; a codebook takes a width, or heads and their width")
    groups = shape[0] if len(shape) == 2 else 1
    norms, (_, row, pos) = store.norms(site), store.tokens()
    median = float(norms.median())
    kept = ordinary(norms[:, None], DROP_NORM) & (pos != record.first[row])
    keep = torch.zeros_like(record.mask)
    keep[row[kept], pos[kept]] = True
    stream = (
        x.flatten(1).float().to(model.device) for x in store.batches(site, cfg.batch_size, seed=cfg.seed, keep=kept)
    )
    first = store.batches(site, min(int(kept.sum()), SAMPLE), seed=cfg.seed, keep=kept)
    sample = next(first).flatten(1).float().to(model.device)
    start = Quantiser(sample, cfg, groups=groups)
    untrained, plain = start.frozen(), None
    if cfg.task == "none":
        trained = train_on_activations(stream, sample, cfg, groups=groups)
    else:
        trained = train_in_model(model, {str(site): start}, record, keep, cfg, finetune=finetune)
        plain = train_in_model(model, {}, record, keep, cfg, finetune=True).model if finetune else None
    dictionaries: dict[str, Dictionary] = {
        "codebook": next(iter(trained.codebooks.values())),
        "first codes": untrained,
        "random codes": random_codes(untrained, sample, seed=cfg.seed + 1),
        "zero ablation": ZeroDictionary(torch.zeros_like(sample[0])),
    }
    return Learned(trained=trained, model=trained.model or model, plain=plain, dictionaries=dictionaries, median=median)


@torch.no_grad()
def random_codes(like: Codebook, sample: Tensor, *, seed: int) -> Codebook:
    """Gaussian codes, fixed, with the one gain that fits the sample best: they lose by their directions alone."""
    drawn = torch.randn(like.codes.shape, generator=torch_generator(seed, "random-codes")).to(like.codes)
    made = Codebook(drawn, like.k, mean=like.mean, scale=like.scale, similarity="cosine")
    a, q = made.normalised(sample).flatten(1).double(), made.normalised(made(sample)).flatten(1).double()
    gain = float((a * q).sum() / q.square().sum().clamp_min(1e-300))
    return Codebook(drawn * gain, like.k, mean=like.mean, scale=like.scale, similarity="cosine")


def both(search: HeldOut, test: HeldOut) -> tuple[tuple[str, HeldOut], ...]:
    return ("search", search), ("test", test)


def plain_losses(model: LoadedModel, data: HeldOut) -> Tensor:
    """Loss per sequence of a model with nothing spliced in, nats per predicted token."""
    losses = spliced_losses(model, data.record, data.site, {"": None}, data.keep)[""]
    return losses * (len(data.record) / n_predicted(data.record))


def with_finetuned(table: pd.DataFrame, finetuned: Tensor, base: Tensor) -> pd.DataFrame:
    """The row of the model that was finetuned without codes."""
    ce = float(finetuned.mean())
    row = {"dictionary": "finetuned, no codes", "fvu": 0.0, "ce": ce, "ce_increase": ce - float(base.mean())}
    return pd.concat([table, pd.DataFrame([row])], ignore_index=True)


def search_patterns(
    learned: Learned, search: HeldOut, test: HeldOut, latents: dict[str, Tensor], patterns: Sequence[str], seed: int
) -> dict[str, Match]:
    """Pattern -> the code and the neuron that were found for it."""
    coded: dict[str, Coded] = {}
    for name, part in both(search, test):
        coded[name] = encoded(latents[name], neurons_of(learned.model, part), part.keep, learned.codebook.d_dict)
    found: dict[str, Match] = {}
    for pattern in patterns:
        truth = {name: matching(part.record, pattern)[part.keep] for name, part in both(search, test)}
        match = find(coded["search"], truth["search"], coded["test"], truth["test"], seed=seed)
        if match is not None and bool(truth["test"].any()):
            found[pattern] = match
    return found


@torch.no_grad()
def neurons_of(model: LoadedModel, data: HeldOut) -> Tensor:
    """MLP neurons of the site's layer at the kept tokens; the site's own coordinates where there are none."""
    try:
        site = model.table.one(f"neurons.{data.site.layer}")
    except SiteError:
        return data.tokens.cpu()
    parts: list[Tensor] = []
    for start in range(0, len(data.record), CAPTURED):
        with capture(model, site) as acts:
            model(data.record.rows(slice(start, start + CAPTURED)))
        parts.append(acts[site].float().cpu()[data.keep[start : start + CAPTURED]])
    return torch.cat(parts)


def steer_codes(learned: Learned, site: Site, search: HeldOut, test: HeldOut, latents: Tensor, seed: int) -> Steering:
    """Patch random codes in use at the ends of held-out prompts."""
    record = search.record
    next_ids = torch.full_like(record.ids, -1)
    next_ids[:, :-1] = torch.where(record.mask[:, 1:], record.ids[:, 1:], -1)
    drawn = draw_codes(latents, 2 * STEERED, least=5, seed=seed, label="steered")
    half = max(1, len(drawn) // 2)
    wanted, random = drawn[:half], drawn[half:] if len(drawn) > 1 else drawn
    follow = followers(latents, next_ids[search.keep], wanted, FOLLOWERS)
    middle = test.keep.shape[1] // 2
    rows = test.keep[:, middle].nonzero()[:, 0]
    if not len(rows):
        raise InterpError(f"no held-out sequence keeps the token at position {middle}; use longer sequences")
    prompts = from_ids(learned.model, test.record.ids[rows, : middle + 1], test.record.mask[rows, : middle + 1])
    keep = test.keep[rows, : middle + 1]
    return steer(learned.model, site, learned.codebook, prompts, wanted, follow, random, keep=keep)
