"""Distributed alignment search: a subspace learnt so that patching it gives the source's answer (a helper of
`subspace`).

    minimise over A (D, k): mean over training pairs of logit(base's own answer) - logit(answer wanted)
with R^T = Q of A = Q R, patched as a + (a_s - a) R^T R, the model frozen; Adam, batches drawn without replacement.
Paper: A. Geiger et al., Finding alignments between interpretable causal variables and distributed neural
representations, 2023, https://arxiv.org/abs/2303.02536.
Beware: with as many directions as there are, it finds something wherever an activation reaches the output; that it
works says little before it is held against the illusion test, held-out words, random labels and a random model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.analyses.subspace_maths import Basis, Reader, Sides, interchange, unit
from interp.core.errors import InterpError
from interp.core.progress import track
from interp.core.seed import torch_generator

BATCH = 16
"""Pairs per step."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Learnt:
    """A subspace and how its loss went."""

    basis: Basis
    losses: tuple[float, ...]
    """Mean logit difference of the batch at each step; it falls below 0 when the answer flips."""


def learn(
    reader: Reader,
    sides: Sides,
    *,
    k: int,
    n_steps: int,
    lr: float,
    seed: int,
    flipped: Bool[Tensor, " row"] | None = None,
    label: str = "das",
) -> Learnt:
    """Learn k directions. flipped: pairs whose wanted answer is exchanged for the base's own (random labels)."""
    if not 1 <= k <= sides.width:
        raise InterpError(f"k={k} directions of a space of {sides.width}; choose 1 to {sides.width}")
    if n_steps < 1 or lr <= 0:
        raise InterpError(f"n_steps={n_steps} must be at least 1 and lr={lr} above 0")
    generator = torch_generator(seed, "das", label)
    start = torch.randn(sides.width, k, generator=generator, dtype=torch.float64)
    free = unit(start.T).T.contiguous().to(sides.base.device).requires_grad_(True)
    adam = torch.optim.Adam([free], lr=lr)
    sign = torch.ones(len(sides)) if flipped is None else 1 - 2 * flipped.float()
    losses: list[float] = []
    queue: list[int] = []
    for _ in track(range(n_steps), f"subspace: {label}"):
        if len(queue) < min(BATCH, len(sides)):
            queue = torch.randperm(len(sides), generator=generator).tolist()
        rows, queue = torch.tensor(queue[:BATCH]), queue[BATCH:]
        with torch.enable_grad():
            basis = unit(free.T)
            part = Sides(base=sides.base[rows], source=sides.source[rows], label=sides.label[rows])
            difference = reader(interchange(part, basis, basis), rows).logit_diff
            loss = (difference * sign[rows].to(difference)).mean()
        (free.grad,) = torch.autograd.grad(loss, [free])
        adam.step()
        losses.append(float(loss.detach()))
    return Learnt(basis=unit(free.detach().T).cpu(), losses=tuple(losses))


def random_labels(n: int, seed: int) -> Bool[Tensor, " row"]:
    """Half of the pairs, at random, want the base's own answer."""
    flipped = torch.zeros(n, dtype=torch.bool)
    flipped[torch.randperm(n, generator=torch_generator(seed, "random labels"))[: n // 2]] = True
    return flipped


def cosines(a: Float[Tensor, "k D"], b: Float[Tensor, "other D"]) -> float:
    """Largest cosine between two subspaces (of their directions, if k = 1, without sign)."""
    return float(torch.linalg.svdvals(a.double() @ b.double().T)[0])
