"""Which activation and which loss each kind of dictionary is.

kind           activation      reconstruction   sparsity                    auxiliary
topk           top-k           fvu              by k                        auxk
batch_topk     batch top-k     fvu              by k                        auxk
matryoshka     batch top-k     matryoshka       by k                        auxk
multi_topk     top-k (4k)      multi_topk       by k                        auxk
group_max      group-max       fvu              by k                        auxk
gradient_topk  gradient top-k  fvu              by k                        auxk
top_afa        top-AFA         fvu              by the norm of the input    auxk, afa * weight / mean |y|^2
relu           ReLU            squared          l1 * weight
jump_relu      JumpReLU        squared          l0_step or tanh * weight    pre_act
gated          gated           squared          gate_l1 * weight            gate_auxiliary
The weight is that of the config, or `WEIGHTS` where the config gives none. Inputs have norm about sqrt(d_in).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from interp.dictionaries import losses
from interp.dictionaries.activations.base import Activation
from interp.dictionaries.activations.batch_topk import BatchTopK
from interp.dictionaries.activations.gated import Gated
from interp.dictionaries.activations.gradient_topk import GradientTopK
from interp.dictionaries.activations.group_max import GroupMax
from interp.dictionaries.activations.jump_relu import JumpReLU
from interp.dictionaries.activations.relu import ReLU
from interp.dictionaries.activations.top_afa import TopAFA
from interp.dictionaries.activations.topk import TopK
from interp.dictionaries.activity import Activity
from interp.dictionaries.losses import Term
from interp.dictionaries.train_config import TrainConfig

WEIGHTS = {"relu": 2.0, "jump_relu": 1.0, "gated": 2.0, "top_afa": 1 / 32}
"""Sparsity weight of each kind that has one."""


def make_activation(cfg: TrainConfig) -> Activation:
    """The activation of a kind, untrained."""
    match cfg.kind:
        case "batch_topk" | "matryoshka":
            return BatchTopK(cfg.k)
        case "multi_topk":
            return TopK(cfg.k, n_train=4 * cfg.k)
        case "group_max":
            return GroupMax(cfg.k)
        case "gradient_topk":
            return GradientTopK(cfg.k, beta=cfg.gradient_weight)
        case "top_afa":
            return TopAFA()
        case "relu":
            return ReLU()
        case "jump_relu":
            return JumpReLU(cfg.d_dict, threshold=cfg.threshold or 0.01, bandwidth=cfg.bandwidth)
        case "gated":
            return Gated(cfg.d_dict)
        case "topk":
            return TopK(cfg.k)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a kind minimises: reconstruction + weight * ramp * sparsity + auxiliary terms with their weights."""

    reconstruction: Term
    sparsity: Term | None = None
    weight: float = 0.0
    auxiliary: tuple[tuple[float, Term], ...] = ()

    def __call__(self, at: Activity, ramp: float) -> dict[str, Tensor]:
        """The summed loss under `loss`, and its parts."""
        parts = {"reconstruction": self.reconstruction(at)}
        loss = parts["reconstruction"]
        if self.sparsity is not None and self.weight:
            parts["sparsity"] = self.sparsity(at)
            loss = loss + self.weight * ramp * parts["sparsity"]
        parts["aux"] = at.u.new_zeros(())
        for weight, term in self.auxiliary:
            if weight:
                value = term(at)
                parts["aux"] = parts["aux"] + value
                loss = loss + weight * value
        return parts | {"loss": loss}


def _relative_afa(at: Activity) -> Tensor:
    size = at.group.total(at.target.detach().square().sum()) / at.n_tokens()
    return losses.afa(at) / size


def make_objective(cfg: TrainConfig) -> Objective:
    """The loss of a kind."""
    weight = cfg.sparsity_weight if cfg.sparsity_weight >= 0 else WEIGHTS.get(cfg.kind, 0.0)
    auxk = ((cfg.aux_weight, losses.auxk),)
    match cfg.kind:
        case "relu":
            return Objective(reconstruction=losses.squared, sparsity=losses.l1, weight=weight)
        case "jump_relu":
            sparsity = losses.l0_step if cfg.penalty == "step" else losses.tanh()
            pull = ((cfg.pre_act_weight, losses.pre_act),)
            return Objective(reconstruction=losses.squared, sparsity=sparsity, weight=weight, auxiliary=pull)
        case "gated":
            auxiliary = ((1.0, losses.gate_auxiliary),)
            return Objective(
                reconstruction=losses.squared, sparsity=losses.gate_l1, weight=weight, auxiliary=auxiliary
            )  # fmt: skip
        case "top_afa":
            return Objective(reconstruction=losses.fvu, sparsity=_relative_afa, weight=weight, auxiliary=auxk)
        case "matryoshka":
            return Objective(reconstruction=losses.matryoshka(cfg.shells), auxiliary=auxk)
        case "multi_topk":
            return Objective(reconstruction=losses.multi_topk(), auxiliary=auxk)
        case _:
            return Objective(reconstruction=losses.fvu, auxiliary=auxk)
