"""How much would the model's own loss change with each token's activation? Gradients for gradient-aware dictionaries.

    g_t = d L / d y_t ,   L = sum over predicted tokens of -log p(next token), of the untouched model
y is the site that the dictionary writes, x the one it reads (for an autoencoder the same). By causal masking g_t sums
the effects on all later tokens of the sequence. The last token of a sequence has nothing after it and is left out, the
first one too unless asked for. Batches of (x, y, g) go to `Stepper.step(number, x, y, gradient=g)` with
kind="gradient_topk". Source: J. Olmo et al., Features that make a difference, 2025, https://arxiv.org/abs/2411.10397.
Beware: the size of g follows the token's loss, not the feature, so selection normalises it token by token; and a
dictionary that sees g at inference leaks the loss: judge it by plain top-k. Control: `permuted`, gradients of other
tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from interp.core.errors import InterpError
from interp.core.seed import torch_generator
from interp.core.sites import Site
from interp.dictionaries.start import initial
from interp.dictionaries.train import Stepper, Trained, run_steps
from interp.dictionaries.train_config import TrainConfig
from interp.instrument.capture import capture
from interp.instrument.tokens import TokenRecord
from interp.models.model import LoadedModel

POOL = 32
"""Sequences whose tokens are mixed before batches are cut."""
PER_PASS = 4
"""Sequences of one forward and backward pass."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Gradients:
    """Activations of tokens and the gradient of the model's loss at what is to be written."""

    x: Float[Tensor, "n d_in"]
    y: Float[Tensor, "n d_out"]
    g: Float[Tensor, "n d_out"]

    def __len__(self) -> int:
        return len(self.x)

    def take(self, index: Tensor) -> Gradients:
        """Some of the tokens."""
        return Gradients(x=self.x[index], y=self.y[index], g=self.g[index])


def next_token_loss(logits: Float[Tensor, "batch pos d_vocab"], record: TokenRecord) -> Float[Tensor, ""]:
    """Sum over predicted real tokens of -log p(next token), nats, in the graph."""
    real = (record.mask[:, 1:] & record.mask[:, :-1]).to(logits.device)
    targets = record.ids[:, 1:].to(logits.device)[real]
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits[:, :-1][real].to(wide), targets, reduction="sum")


def loss_gradients(
    model: LoadedModel,
    record: TokenRecord,
    read: Site,
    write: Site,
    keep: Bool[Tensor, "batch pos"],
) -> Gradients:
    """One forward and one backward pass; the kept tokens, in order."""
    if keep.shape != record.ids.shape:
        raise InterpError(f"keep has shape {tuple(keep.shape)}, the tokens {tuple(record.ids.shape)}")
    sites = [read] if read == write else [read, write]
    with capture(model, sites, grad=True) as acts:
        next_token_loss(model(record), record).backward()
    where = keep.to(acts[read].device)
    x, y, g = acts[read].detach()[where], acts[write].detach()[where], acts.grad(write).detach()[where]
    return Gradients(x=x.flatten(1).float(), y=y.flatten(1).float(), g=g.flatten(1).float())


def inner_tokens(record: TokenRecord) -> Bool[Tensor, "batch pos"]:
    """Real tokens that are neither the first of their sequence nor the last."""
    followed = torch.zeros_like(record.mask)
    followed[:, :-1] = record.mask[:, 1:]
    return record.mask & followed & (torch.arange(record.ids.shape[1]) != record.first[:, None])


def gradient_batches(
    model: LoadedModel,
    record: TokenRecord,
    read: str | Site,
    write: str | Site | None = None,
    *,
    batch_size: int,
    seed: int,
    keep: Bool[Tensor, "batch pos"] | None = None,
) -> Iterator[Gradients]:
    """Endless shuffled batches; sequences in a new order each epoch, tokens mixed over `POOL` sequences.

    keep: tokens that may be drawn; by default all but the first and last of each sequence. Activations are computed
    again each epoch, nothing is stored.
    """
    if batch_size < 1:
        raise InterpError(f"batch_size={batch_size} must be at least 1")
    source = model.table.one(read)
    target = source if write is None else model.table.one(write)
    chosen = inner_tokens(record) if keep is None else keep & inner_tokens(record)
    if not bool(chosen.any()):
        raise InterpError("no token is left to draw; lengthen the sequences or loosen `keep`")
    waiting: Gradients | None = None
    epoch = 0
    while True:
        generator = torch_generator(seed, "loss-gradients", epoch)
        order = torch.randperm(len(record), generator=generator)
        for pool in order.split(POOL):
            parts = [
                loss_gradients(model, record.rows(rows.tolist()), source, target, chosen[rows])
                for rows in pool.split(PER_PASS)
                if bool(chosen[rows].any())
            ]
            mixed = joined(parts if waiting is None else [waiting, *parts])
            mixed = mixed.take(torch.randperm(len(mixed), generator=generator).to(mixed.x.device))
            n_full = len(mixed) // batch_size * batch_size
            for index in torch.arange(n_full, device=mixed.x.device).split(batch_size) if n_full else ():
                yield mixed.take(index)
            waiting = mixed.take(torch.arange(n_full, len(mixed), device=mixed.x.device))
        epoch += 1


def joined(parts: list[Gradients]) -> Gradients:
    """One after the other."""
    return Gradients(
        x=torch.cat([part.x for part in parts]),
        y=torch.cat([part.y for part in parts]),
        g=torch.cat([part.g for part in parts]),
    )


def permuted(batches: Iterator[Gradients], *, seed: int) -> Iterator[Gradients]:
    """Control: every token gets the gradient of another token of its batch."""
    generator = torch_generator(seed, "permuted-gradients")
    for batch in batches:
        order = torch.randperm(len(batch), generator=generator).to(batch.g.device)
        yield Gradients(x=batch.x, y=batch.y, g=batch.g[order])


def train_by_gradient(
    batches: Iterator[Gradients], sample: Gradients, cfg: TrainConfig, *, transcoder: bool = False
) -> Trained:
    """Train a gradient-aware dictionary; `transcoder` reads x and writes y, otherwise x is reconstructed."""
    if cfg.kind != "gradient_topk":
        raise InterpError(f"kind={cfg.kind!r} looks at no gradient; use kind='gradient_topk'")
    steps = Stepper(initial(sample.x, cfg, targets=sample.y if transcoder else None), cfg)

    def step(number: int, batch: Gradients) -> dict[str, float | int]:
        return steps.step(number, batch.x, batch.y if transcoder else None, gradient=batch.g)

    curve = run_steps(step, batches, cfg)
    scale = float(steps.sae.scale_in)
    return Trained(sae=steps.sae.folded().requires_grad_(False), curve=curve, scale=scale)
