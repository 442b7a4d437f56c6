"""Disentanglement (RAVEL): can one attribute be swapped by exchanging latents, without moving the others?

Pairs of a base and a source activation, and for each an attribute that should become the source's (cause) while the
others stay the base's (isolation). A mask m in [0, 1] over latents mixes the codes,
    f = (1 - m) f_base + m f_source ,   x_new = decode(f) + (x_base - decode(f_base))
and is trained by Adam on the cross-entropy of both aims together, sigmoid with a falling temperature; for the score it
is hard. cause = share of pairs whose attribute reads as the source's, isolation = share of pairs and other attributes
that read as the base's, score = their mean.
Beware: doing nothing scores .5 (isolation 1), swapping everything too (cause 1), so .5 is the floor; only pairs whose
attributes differ count for cause. What an attribute reads as is said by `readout`: for a model, its logits over the
attribute's values with x_new in place. The model has to know the attribute; SmolLM2-135M does not know RAVEL's facts,
and no number of a real model is claimed here.
Sources: J. Huang et al. 2024, RAVEL, https://arxiv.org/abs/2402.17700; the mask over latents: A. Karvonen et al. 2025,
SAEBench, https://arxiv.org/abs/2503.09532 (they decode without the error term by default).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from interp.core.errors import InterpError, unknown
from interp.core.seed import torch_generator
from interp.dictionaries.base import Dictionary

METRICS = {
    "ravel": "v1: mean of cause (attribute reads as the source's, pairs that differ) and isolation (other attributes "
    "read as the base's) on test pairs, with a hard mask over latents trained on training pairs; floor .5",
}
Readout = Callable[[Float[Tensor, "n d"]], dict[str, Float[Tensor, "n v"]]]
"""Activations -> logits over the values of each attribute, differentiable."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """Base and source activations with what their attributes are."""

    base: Float[Tensor, "n d"]
    source: Float[Tensor, "n d"]
    base_values: dict[str, Int[Tensor, "n"]]
    source_values: dict[str, Int[Tensor, "n"]]

    def __post_init__(self) -> None:
        if set(self.base_values) != set(self.source_values) or len(self.base_values) < 2:
            raise InterpError("pairs need the same two or more attributes for base and source")


@dataclass(frozen=True, kw_only=True, eq=False)
class Disentangled:
    """What a mask over latents does on test pairs."""

    cause: float
    isolation: float
    mask: Bool[Tensor, "m"]

    @property
    def score(self) -> float:
        return (self.cause + self.isolation) / 2


@torch.no_grad()
def swapped(dictionary: Dictionary, pairs: Pairs, mask: Float[Tensor, "m"] | Bool[Tensor, "m"]) -> Float[Tensor, "n d"]:
    """x_new for a mask."""
    return _swap(_parts(dictionary, pairs), dictionary.features, mask.float(), pairs.base)


def score_mask(
    readout: Readout, dictionary: Dictionary, pairs: Pairs, attribute: str, mask: Bool[Tensor, "m"]
) -> Disentangled:
    """Cause and isolation of a hard mask."""
    with torch.no_grad():
        read = {name: logits.argmax(-1) for name, logits in readout(swapped(dictionary, pairs, mask)).items()}
    differ = pairs.base_values[attribute] != pairs.source_values[attribute]
    if not bool(differ.any()):
        raise InterpError(f"no pair differs in {attribute!r}, so there is nothing to cause")
    cause = (read[attribute] == pairs.source_values[attribute])[differ].double().mean()
    others = [read[name] == value for name, value in pairs.base_values.items() if name != attribute]
    return Disentangled(cause=float(cause), isolation=float(torch.cat(others).double().mean()), mask=mask)


def disentangle(
    readout: Readout,
    dictionary: Dictionary,
    train: Pairs,
    test: Pairs,
    attribute: str,
    *,
    n_steps: int = 200,
    batch_size: int = 128,
    lr: float = 0.05,
    temperatures: tuple[float, float] = (1.0, 1e-2),
    seed: int = 0,
) -> Disentangled:
    """Train the mask on training pairs, score it on test pairs."""
    if attribute not in train.base_values:
        raise unknown("attribute", attribute, train.base_values)
    parts, features = _parts(dictionary, train), dictionary.features.detach()
    logit = torch.zeros(dictionary.d_dict, requires_grad=True)
    optimiser = torch.optim.Adam([logit], lr=lr)
    generator = torch_generator(seed, "ravel", attribute)
    for step in range(n_steps):
        share = step / max(n_steps - 1, 1)
        temperature = temperatures[0] ** (1 - share) * temperatures[1] ** share
        chosen = torch.randint(len(train.base), (min(batch_size, len(train.base)),), generator=generator)
        x = _swap(
            tuple(part[chosen] for part in parts), features, torch.sigmoid(logit / temperature), train.base[chosen]
        )
        loss = torch.zeros(())
        for name, logits in readout(x).items():
            wanted = train.source_values if name == attribute else train.base_values
            weight = 1.0 if name == attribute else 1 / (len(train.base_values) - 1)
            loss = loss + weight * F.cross_entropy(logits, wanted[name][chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return score_mask(readout, dictionary, test, attribute, logit.detach() > 0)


def random_masks(
    readout: Readout, dictionary: Dictionary, test: Pairs, attribute: str, like: Disentangled, *,
    n: int = 20, seed: int = 0,
) -> Sequence[Disentangled]:  # fmt: skip
    """The null: masks of as many latents that differ between the pairs, drawn at random."""
    codes = _parts(dictionary, test)
    live = (codes[0] != codes[1]).any(0).nonzero()[:, 0]
    generator = torch_generator(seed, "ravel-null", attribute)
    found: list[Disentangled] = []
    for _ in range(n):
        mask = torch.zeros(dictionary.d_dict, dtype=torch.bool)
        mask[live[torch.randperm(len(live), generator=generator)[: int(like.mask.sum())]]] = True
        found.append(score_mask(readout, dictionary, test, attribute, mask))
    return found


@torch.no_grad()
def _parts(dictionary: Dictionary, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Dense codes of base and source, in units in which the features add up."""
    found: list[Tensor] = []
    for x in (pairs.base, pairs.source):
        codes = dictionary.encode(x)
        dense = codes.dense()
        found.append(dense if codes.gain is None else dense * codes.gain)
    return found[0], found[1]


def _swap(parts: tuple[Tensor, ...], features: Tensor, mask: Tensor, base: Tensor) -> Tensor:
    """x_base + m (f_source - f_base) D: decoders are linear, so the error term stays by itself."""
    return base + ((parts[1] - parts[0]) * mask) @ features
