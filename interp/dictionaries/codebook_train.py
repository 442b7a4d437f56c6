"""Learn codebooks: on stored activations, or spliced into a model that is frozen or learns too.

    train_on_activations    autoencoder loss alone: fast, and the model is not run
    train_in_model          loss = task_weight * task + sum over sites of (autoencoder + commitment)
        task     kl: KL(untouched || spliced), ce: cross-entropy of the next token; nats per token
        frozen   only codes learn; they get the task's gradient through the layers above
        finetune a copy of the model learns as well, by the straight-through (or rotated) gradient and by commitment;
                 with no quantisers it is the baseline of a codebook model: equal steps, equal data, no codebooks
Tokens that are left out (`keep` false: padding, position 0, massive activations) keep their own activation.
Trap: a finetuned model must be compared with one finetuned without codebooks, since finetuning alone lowers the loss.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from interp.core.errors import InterpError
from interp.core.progress import track
from interp.core.seed import torch_generator
from interp.core.sites import Site
from interp.dictionaries.codebook import Codebook
from interp.dictionaries.codebook_config import CodebookConfig, shape_at
from interp.dictionaries.codebook_quantise import Quantised, Quantiser
from interp.instrument.edits import Context, Edit, edited
from interp.instrument.guards import frozen
from interp.instrument.tokens import TokenRecord
from interp.models.model import LoadedModel

CURVE = ("step", "tokens", "loss", "task", "fvu", "used")


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedCodebooks:
    """What training made."""

    model: LoadedModel | None
    """The model that the codebooks belong to: the one given, or its finetuned copy; None on stored activations."""
    codebooks: Mapping[str, Codebook]
    """By site; on stored activations one, named `codes`."""
    curve: pd.DataFrame


def optimiser(groups: Sequence[tuple[Iterable[Tensor], float]]) -> torch.optim.Adam | None:
    """Adam over parameters that learn, each list at its peak rate; None where none does."""
    listed = [{"params": found, "lr": lr, "peak": lr} for given, lr in groups if (found := list(given))]
    return torch.optim.Adam(listed) if listed else None


def take_step(adam: torch.optim.Adam | None, loss: Tensor, step: int, cfg: CodebookConfig) -> None:
    """One update; a loss that is not finite ends the run."""
    if not math.isfinite(float(loss.detach())):
        raise InterpError(f"the loss is {float(loss.detach())} at step {step}; lower lr={cfg.lr} or model_lr")
    if adam is None:
        return
    for group in adam.param_groups:
        group["lr"] = group["peak"] * shape_at(step, cfg)
    adam.zero_grad(set_to_none=True)
    loss.backward()
    adam.step()


def learned(quantiser: Quantiser) -> list[Tensor]:
    return [parameter for parameter in quantiser.parameters() if parameter.requires_grad]


def train_on_activations(
    batches: Iterable[Float[Tensor, "batch d_in"]],
    sample: Float[Tensor, "n d_in"],
    cfg: CodebookConfig,
    *,
    groups: int = 1,
) -> TrainedCodebooks:
    """Codes of one site from batches of its activations; `sample` sets the normalisation and the first codes."""
    if cfg.task != "none":
        raise InterpError(f"task={cfg.task!r} needs the model; use train_in_model, or task='none'")
    quantiser = Quantiser(sample, cfg, groups=groups).train()
    adam, log = optimiser([(learned(quantiser), cfg.lr)]), _Log(cfg)
    stream = iter(batches)
    for step in track(range(cfg.n_steps), "learning codes"):
        x = next(stream, None)
        if x is None:
            raise InterpError(f"the batches ended at step {step} of {cfg.n_steps}; give more, or an endless stream")
        found = quantiser(x.to(sample))
        loss = found.autoencoder * cfg.autoencoder_weight
        take_step(adam, loss, step, cfg)
        quantiser.observe(found)
        log.note(step, len(x), loss, None, {"codes": found})
    return TrainedCodebooks(model=None, codebooks={"codes": quantiser.frozen()}, curve=log.table())


def train_in_model(
    model: LoadedModel,
    quantisers: Mapping[str, Quantiser],
    record: TokenRecord,
    keep: Bool[Tensor, "batch pos"],
    cfg: CodebookConfig,
    *,
    finetune: bool = False,
) -> TrainedCodebooks:
    """Codes of one or more sites, learned in place; the quantisers are changed, the model given is not."""
    if keep.shape != record.ids.shape or not bool(keep.any(1).all()):
        raise InterpError(f"keep {tuple(keep.shape)} must mark tokens in every row of {tuple(record.ids.shape)}")
    if cfg.task == "none" or not (quantisers or finetune):
        raise InterpError("training in the model needs task='kl' or 'ce', and codebooks or finetune=True to learn")
    student = _copy(model) if finetune else model
    by_site = {student.table.one(name): quantiser.train() for name, quantiser in quantisers.items()}
    groups: list[tuple[Iterable[Tensor], float]] = [(learned(quantiser), cfg.lr) for quantiser in by_site.values()]
    if finetune:
        groups.append((student.module.parameters(), cfg.model_lr))
    adam, log = optimiser(groups), _Log(cfg)
    order = _rows(len(record), cfg)
    with ExitStack() as held:
        if not finetune:
            held.enter_context(frozen(student.module))
        for step in track(range(cfg.n_steps), "learning codes in the model"):
            index = next(order)
            rows, chosen = record.rows(index), keep[index]
            loss, task, found = _losses(model, student, by_site, rows, chosen, cfg, finetune=finetune)
            take_step(adam, loss, step, cfg)
            for site, quantised in found.items():
                by_site[site].observe(quantised)
            log.note(step, rows.n_tokens, loss, task, {str(site): each for site, each in found.items()})
    if finetune:
        student.module.requires_grad_(False)
    codebooks = {str(site): quantiser.frozen() for site, quantiser in by_site.items()}
    return TrainedCodebooks(model=student, codebooks=codebooks, curve=log.table())


def _losses(
    model: LoadedModel,
    student: LoadedModel,
    by_site: Mapping[Site, Quantiser],
    rows: TokenRecord,
    keep: Tensor,
    cfg: CodebookConfig,
    *,
    finetune: bool,
) -> tuple[Tensor, Tensor, dict[Site, Quantised]]:
    """Total loss, task loss, and what each quantiser did."""
    found: dict[Site, Quantised] = {}
    target = model(rows) if cfg.task == "kl" else None
    edits = [learning_edit(site, quantiser, keep, found) for site, quantiser in by_site.items()]
    with ExitStack() as held:
        held.enter_context(gradients(student))
        if edits:
            held.enter_context(edited(student, edits))
        logits = student(rows)
    task = task_loss(logits, target, rows)
    loss = cfg.task_weight * task
    for quantised in found.values():
        loss = loss + cfg.autoencoder_weight * quantised.autoencoder
        if finetune:
            loss = loss + cfg.commitment_weight * quantised.commitment / 2
    return loss, task, found


def learning_edit(site: Site, quantiser: Quantiser, keep: Tensor, found: dict[Site, Quantised]) -> Edit:
    """The splice whose gradient reaches the codes and the network below; only kept tokens are quantised."""

    def function(x: Tensor, context: Context) -> Tensor:
        chosen = context.chosen.to(x.device)
        flat = x.flatten(2)
        found[site] = quantised = quantiser(flat[chosen].to(quantiser.mean))
        return flat.masked_scatter(chosen[..., None], quantised.output.to(x)).reshape(x.shape)

    return Edit(site, function, at=keep, label="codebook")


def task_loss(
    logits: Float[Tensor, "batch pos d_vocab"], target: Float[Tensor, "batch pos d_vocab"] | None, rows: TokenRecord
) -> Float[Tensor, ""]:
    """KL(target || logits) per real token, or the next-token cross-entropy where there is no target; nats."""
    real = rows.mask.to(logits.device)
    if target is not None:
        log_p, log_q = target[real].float().log_softmax(-1), logits[real].float().log_softmax(-1)
        return F.kl_div(log_q, log_p, log_target=True, reduction="sum") / len(log_p)
    predicted = real[:, 1:] & real[:, :-1]
    return F.cross_entropy(logits[:, :-1][predicted].float(), rows.ids.to(logits.device)[:, 1:][predicted])


@contextmanager
def gradients(model: LoadedModel) -> Generator[None, None, None]:
    """Forwards inside keep their graph."""
    model.wants_grad += 1
    try:
        yield
    finally:
        model.wants_grad -= 1


def _copy(model: LoadedModel) -> LoadedModel:
    """A model of its own to train; evaluation mode stays, so that nothing is dropped out."""
    module = copy.deepcopy(model.module).requires_grad_(True)
    return LoadedModel(module=module, tokenizer=model.tokenizer, source=f"{model.source} (finetuned)")


def _rows(n: int, cfg: CodebookConfig) -> Generator[list[int], None, None]:
    """Endless passes over the rows, each in a random order."""
    epoch, waiting = 0, list[int]()
    while True:
        while len(waiting) < cfg.rows_per_step:
            waiting += torch.randperm(n, generator=torch_generator(cfg.seed, "codebook-rows", epoch)).tolist()
            epoch += 1
        yield waiting[: cfg.rows_per_step]
        del waiting[: cfg.rows_per_step]


@dataclass
class _Log:
    """Rows of the training curve."""

    cfg: CodebookConfig
    tokens: int = 0
    rows: list[tuple[object, ...]] = field(default_factory=list[tuple[object, ...]])

    def note(self, step: int, n: int, loss: Tensor, task: Tensor | None, found: Mapping[str, Quantised]) -> None:
        self.tokens += n
        if step % self.cfg.log_every and step != self.cfg.n_steps - 1:
            return
        fvu = [each.fvu for each in found.values()]
        used = [len(row.unique()) / self.cfg.n_codes for each in found.values() for row in each.indices.unbind(1)]
        self.rows.append(
            (
                step,
                self.tokens,
                float(loss.detach()),
                None if task is None else float(task.detach()),
                sum(fvu) / len(fvu) if fvu else None,
                sum(used) / len(used) if used else None,
            )
        )

    def table(self) -> pd.DataFrame:
        """`used` is the share of codes that occur in a batch; `fvu` and `used` are means over sites."""
        return pd.DataFrame(self.rows, columns=list(CURVE))
