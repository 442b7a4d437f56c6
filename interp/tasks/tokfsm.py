"""TokFSM: can a network learn a hidden state machine from its tokens, and is the state written inside it?

A random directed graph of states, each with a few equally likely successors. A state is written as base-10 digits and a
separator, so that no single token tells it:   3 7 | 0 4 | 9 9 | ...
    legal share   how often the next state that the model writes (digits drawn from its own distribution, given states
                  before it) is a successor of the last one; a model that knows nothing scores n_edges / n_states
Source: A. Tamkin et al. 2023, Codebook features, https://arxiv.org/abs/2310.17230, section 3: 100 states, 10 edges,
two digits, 11 tokens. `train_on` makes a small Llama for it; the true state of every token is known (`states_of`), so
a code can be judged without a reader.
Trap: the first digit of the next state is predicted at the separator, where the whole last state is needed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from interp.core.errors import InterpError
from interp.core.progress import track
from interp.core.seed import torch_generator
from interp.instrument.tokens import TokenRecord, from_ids
from interp.models.model import LoadedModel
from interp.models.tiny import tiny_model

BASE = 10
SEPARATOR = BASE
"""Token id of the separator; 0 to 9 are the digits."""
D_VOCAB = BASE + 1


@dataclass(frozen=True, kw_only=True, eq=False)
class TokFSM:
    """A state machine and how it is written."""

    allowed: Bool[Tensor, "state state"]
    """allowed[s, t]: t may follow s."""

    @classmethod
    def random(cls, n_states: int = 100, n_edges: int = 10, seed: int = 0) -> TokFSM:
        """Each state gets `n_edges` different successors, itself perhaps among them."""
        if not 1 <= n_edges <= n_states or n_states < 2:
            raise InterpError(f"n_edges={n_edges} must lie in 1..n_states={n_states}, with at least 2 states")
        score = torch.rand(n_states, n_states, generator=torch_generator(seed, "tokfsm"))
        return cls(allowed=score >= score.topk(n_edges, dim=1).values[:, -1:])

    @property
    def n_states(self) -> int:
        return len(self.allowed)

    @property
    def n_digits(self) -> int:
        """Digits of a state."""
        return len(str(self.n_states - 1))

    @property
    def chance(self) -> float:
        """Legal share of a uniformly drawn next state."""
        return float(self.allowed.double().mean())

    def walks(self, n: int, n_states: int, *, generator: torch.Generator) -> Int[Tensor, "n step"]:
        """Random walks from random states."""
        weights = self.allowed.double()
        found = [torch.randint(self.n_states, (n,), generator=generator)]
        for _ in range(n_states - 1):
            found.append(torch.multinomial(weights[found[-1]], 1, generator=generator)[:, 0])
        return torch.stack(found, dim=1)

    def written(self, walks: Int[Tensor, "n step"]) -> Int[Tensor, "n pos"]:
        """Digits, most significant first, and a separator after each state."""
        powers = BASE ** torch.arange(self.n_digits - 1, -1, -1)
        digits = walks[..., None] // powers % BASE
        return F.pad(digits, (0, 1), value=SEPARATOR).flatten(1)

    def states_of(self, ids: Int[Tensor, "n pos"]) -> Int[Tensor, "n pos"]:
        """The state that is complete at each token: at its last digit and its separator; -1 elsewhere."""
        period = self.n_digits + 1
        padded = F.pad(ids, (0, -ids.shape[1] % period), value=SEPARATOR).unflatten(1, (-1, period))
        powers = BASE ** torch.arange(self.n_digits - 1, -1, -1)
        state = (padded[..., : self.n_digits] * powers).sum(-1)
        found = torch.full(padded.shape, -1)
        found[..., self.n_digits - 1], found[..., self.n_digits] = state, state
        return found.flatten(1)[:, : ids.shape[1]]

    def record(self, model: LoadedModel, n: int, n_states: int, *, seed: int) -> TokenRecord:
        """Written walks as a record."""
        return from_ids(model, self.written(self.walks(n, n_states, generator=torch_generator(seed, "tokfsm-walks"))))


def small_model(task: TokFSM, *, n_layers: int = 2, d_model: int = 64, n_ctx: int = 64, seed: int = 0) -> LoadedModel:
    """An untrained Llama for the task."""
    fields: Mapping[str, Any] = {
        "vocab_size": D_VOCAB, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    made = tiny_model(
        "llama", seed=seed, n_layers=n_layers, d_model=d_model, n_heads=4, n_kv_heads=4, d_mlp=4 * d_model,
        n_ctx=n_ctx, std=0.05, overrides=fields,
    )  # fmt: skip
    return LoadedModel(module=made.module, source=f"tokfsm-{task.n_states}")


def train_on(
    task: TokFSM,
    model: LoadedModel,
    *,
    n_steps: int = 1000,
    batch_size: int = 64,
    n_states: int = 16,
    lr: float = 3e-3,
    seed: int = 0,
) -> LoadedModel:
    """A trained copy: cross-entropy of every next token, Adam, fresh walks at each step."""
    module = copy.deepcopy(model.module).requires_grad_(True)
    generator = torch_generator(seed, "tokfsm-train")
    adam = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.0)
    for step in track(range(n_steps), "training on TokFSM"):
        ids = task.written(task.walks(batch_size, n_states, generator=generator)).to(model.device)
        for group in adam.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50, (n_steps - step) / (0.3 * n_steps))
        logits = module(input_ids=ids[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
    return LoadedModel(module=module.requires_grad_(False), source=model.source)


@torch.no_grad()
def next_states(
    task: TokFSM, model: LoadedModel, record: TokenRecord, *, seed: int = 0, greedy: bool = False
) -> Int[Tensor, " n"]:
    """The state that the model writes after each prompt, which ends on a separator; digits drawn, or the likeliest.

    Edits that are open while this runs are applied in each of the forwards; they see the prompt grow by a digit.
    """
    if not bool((record.ids[:, -1] == SEPARATOR).all()):
        raise InterpError("a prompt does not end on a separator; cut it after a state")
    generator = torch_generator(seed, "tokfsm-next")
    ids, state = record.ids, torch.zeros(len(record), dtype=torch.long)
    for _ in range(task.n_digits):
        p = model(from_ids(model, ids))[:, -1, :BASE].double().softmax(-1).cpu()
        digit = p.argmax(-1) if greedy else torch.multinomial(p, 1, generator=generator)[:, 0]
        state = state * BASE + digit
        ids = torch.cat([ids, digit[:, None]], dim=1)
    return state


def legal(task: TokFSM, last: Int[Tensor, " n"], following: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """1 where the second state may follow the first; a number that is no state may not."""
    inside = following < task.n_states
    return (task.allowed[last, following.clamp_max(task.n_states - 1)] & inside).double()


def legal_share(task: TokFSM, model: LoadedModel, *, n: int = 256, n_states: int = 8, seed: int = 1) -> float:
    """Share of legal next states after fresh walks."""
    record = task.record(model, n, n_states, seed=seed)
    last = task.states_of(record.ids)[:, -1]
    return float(legal(task, last, next_states(task, model, record, seed=seed)).mean())
