"""Does patching a code make the model say what comes after that code?

    followers(c)  the tokens whose share of next tokens rises most after code c in the training text
    effect(p, c)  mean over prompts of the change of log P(followers(c)) at the last token when code p is patched there,
                  in nats, against the same prompt with the codebook in place and its own codes
effect(c, c) is compared with effect(r, c) for random codes r in use, patched in the same number of slots. Prompts are
other text than the followers come from. Slots are replaced from the least similar code on.
Source: A. Tamkin et al. 2023, https://arxiv.org/abs/2310.17230 (interventions that activate chosen codes).
Traps: patching any code moves the model, hence the control; codes in use everywhere have followers of average text,
whose probability hardly rises; a code is one of k, so patching one slot of many does little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import InterpError
from interp.core.progress import track
from interp.core.seed import torch_generator
from interp.core.sites import Site
from interp.dictionaries.codebook import Codebook
from interp.dictionaries.codes import SparseCodes
from interp.dictionaries.splice import splice
from interp.instrument.edits import Context, Edit, edited
from interp.instrument.tokens import TokenRecord
from interp.models.model import LoadedModel

ROWS = 8
"""Prompts per forward."""


def replaced(codebook: Codebook, codes: SparseCodes, latents: Sequence[int], slots: int = 0) -> SparseCodes:
    """Codes with the last `slots` choices (0: all) of each group concerned replaced by the given latents, in turn.

    A latent -1 - g is the zero code of group g. Groups that no latent belongs to keep their own.
    """
    k, size = codebook.k, codebook.n_codes
    if not latents or not 0 <= slots <= k:
        raise InterpError(f"{len(latents)} latents in slots={slots}: give at least one, and slots from 0 to k={k}")
    by_group: dict[int, list[int]] = {}
    for latent in latents:
        group = latent // size if latent >= 0 else -1 - latent
        if latent >= codebook.d_dict or group >= codebook.n_groups:
            raise InterpError(f"latent {latent} is outside the codebook, which has latents 0 to {codebook.d_dict - 1}")
        by_group.setdefault(group, []).append(latent)
    values, indices = codes.values.clone(), codes.indices.clone()
    for group, given in by_group.items():
        for number, slot in enumerate(range((group + 1) * k - (slots or k), (group + 1) * k)):
            latent = given[number % len(given)]
            indices[..., slot] = max(latent, 0)
            values[..., slot] = 1 / k if latent >= 0 else 0
    return SparseCodes(values, indices, codes.d_dict)


def patch_codes(
    site: str | Site,
    codebook: Codebook,
    latents: Sequence[int],
    *,
    at: Bool[Tensor, "batch pos"],
    slots: int = 0,
) -> Edit:
    """The edit that puts chosen codes at chosen tokens; use it after `splice` for the others, or alone."""

    def function(x: Tensor, _: Context) -> Tensor:
        codes = codebook.encode(x.float().flatten(2))
        return codebook.decode(replaced(codebook, codes, latents, slots)).reshape(x.shape).to(x)

    return Edit(site, function, at=at, label=f"patch {len(latents)} codes")


@dataclass(frozen=True, kw_only=True, eq=False)
class Steering:
    """Effects of patched codes on the followers of some codes."""

    latents: Int[Tensor, " code"]
    """Codes that were steered."""
    followers: Int[Tensor, "code next"]
    own: Float[Tensor, "code prompt"]
    """effect(c, c), one entry per prompt."""
    random: Float[Tensor, "draw code"]
    """effect(r, c), mean over prompts."""
    said_before: Float[Tensor, " code"]
    """Share of prompts whose most probable next token is a follower."""
    said_after: Float[Tensor, " code"]

    def table(self, names: dict[int, str]) -> pd.DataFrame:
        """One row per code; `names` is the text of each token."""
        return pd.DataFrame(
            {
                "latent": self.latents.tolist(),
                "effect": self.own.mean(1).tolist(),
                "random_mean": self.random.mean(0).tolist(),
                "random_p95": self.random.quantile(0.95, dim=0).tolist(),
                "said_before": self.said_before.tolist(),
                "said_after": self.said_after.tolist(),
                "followers": [" ".join(repr(names.get(i, str(i))) for i in row) for row in self.followers.tolist()],
            }
        )


def followers(
    latents: Int[Tensor, "n slot"], next_ids: Int[Tensor, " n"], wanted: Int[Tensor, " code"], n_next: int
) -> Int[Tensor, "code next"]:
    """Tokens whose share among next tokens rises most after each wanted code; next id -1 is unknown and left out."""
    known = next_ids >= 0
    latents, next_ids = latents[known], next_ids[known]
    size = int(next_ids.max()) + 1
    base = torch.bincount(next_ids, minlength=size).double() / len(next_ids)
    found: list[Tensor] = []
    for latent in wanted.tolist():
        after = next_ids[(latents == latent).any(1)]
        lift = torch.bincount(after, minlength=size).double() / max(len(after), 1) - base
        found.append(lift.topk(min(n_next, size)).indices)
    return torch.stack(found)


def draw_codes(latents: Int[Tensor, "n slot"], n: int, *, least: int, seed: int, label: str) -> Int[Tensor, " code"]:
    """Codes chosen at random among those in use at `least` tokens or more; fewer where there are fewer."""
    counts = torch.bincount(latents.reshape(-1))
    live = (counts >= least).nonzero()[:, 0]
    if not len(live):
        raise InterpError(f"no code is chosen at {least} tokens; use more text")
    return live[torch.randperm(len(live), generator=torch_generator(seed, label))[:n]]


@torch.no_grad()
def steer(
    model: LoadedModel,
    site: Site,
    codebook: Codebook,
    prompts: TokenRecord,
    wanted: Int[Tensor, " code"],
    follow: Int[Tensor, "code next"],
    drawn: Int[Tensor, " draw"],
    *,
    keep: Bool[Tensor, "batch pos"],
    slots: int = 0,
) -> Steering:
    """Patch each wanted and each random code at the last token of every prompt."""
    last = torch.zeros_like(keep)
    last[torch.arange(len(prompts)), prompts.last] = True
    if not bool((keep & last).any(1).all()):
        raise InterpError("a prompt's last token is left out; end prompts on ordinary tokens")
    base = _last_logits(model, site, codebook, prompts, keep, last, None, slots).log_softmax(-1)
    before = _mass(base, follow)
    own: list[Tensor] = []
    said: list[Tensor] = []
    random: list[Tensor] = []
    jobs = [(True, latent) for latent in wanted.tolist()] + [(False, latent) for latent in drawn.tolist()]
    for mine, latent in track(jobs, "patching codes"):
        log_p = _last_logits(model, site, codebook, prompts, keep, last, latent, slots).log_softmax(-1)
        change = _mass(log_p, follow) - before
        if mine:
            row = len(own)
            own.append(change[:, row])
            said.append(torch.isin(log_p.argmax(-1), follow[row]).double().mean())
        else:
            random.append(change.mean(0))
    top = base.argmax(-1)
    return Steering(
        latents=wanted,
        followers=follow,
        own=torch.stack(own),
        random=torch.stack(random),
        said_before=torch.stack([torch.isin(top, row).double().mean() for row in follow]),
        said_after=torch.stack(said),
    )


def _mass(log_p: Float[Tensor, "prompt d_vocab"], follow: Int[Tensor, "code next"]) -> Float[Tensor, "prompt code"]:
    """log of the probability of all followers of each code together."""
    return log_p[:, follow].logsumexp(-1)


def _last_logits(
    model: LoadedModel,
    site: Site,
    codebook: Codebook,
    prompts: TokenRecord,
    keep: Tensor,
    last: Tensor,
    latent: int | None,
    slots: int,
) -> Float[Tensor, "prompt d_vocab"]:
    """Logits at the last token, float64 on the cpu, with the codebook in place and perhaps a code patched."""
    found: list[Tensor] = []
    for start in range(0, len(prompts), ROWS):
        part = slice(start, start + ROWS)
        rows, own, end = prompts.rows(part), keep[part], last[part]
        edits = [splice(site, codebook, own)]
        if latent is not None:
            edits = [splice(site, codebook, own & ~end), patch_codes(site, codebook, [latent], at=end, slots=slots)]
        edits = [edit for edit in edits if not isinstance(edit.at, Tensor) or bool(edit.at.any())]
        with edited(model, edits):
            logits = model(rows)
        found.append(logits[torch.arange(len(rows)), rows.last.to(logits.device)].double().cpu())
    return torch.cat(found)
