"""Subspace patching: which directions of an activation carry a variable, and are they what the model itself uses?

Base and source prompts differ in one variable. A subspace R (k, D) is learnt on training pairs so that
    a' = a + (a_source - a) R^T R
makes the model answer the base as if it had the source's variable (distributed alignment search). On pairs with other
words it is then measured beside difference of means, random directions, random labels, a random model, and put to the
illusion test (`subspace_illusion`), always:
    effect = (LD_base - LD_patched) / LD_base,  LD = logit(base's answer) - logit(answer wanted), ratio of means
Papers: A. Geiger et al. 2023, https://arxiv.org/abs/2303.02536; A. Makelov, G. Lange, N. Nanda, Is this the subspace
you are looking for?, 2023, https://arxiv.org/abs/2311.17030.
Beware: optimisation finds an effective direction at MLPs that carry nothing; the row part is patched at length 1, and
its size depends on that; the effect is of logits, interchange accuracy (the answer wanted is the likeliest of all) is
stricter; `trusted` means that no test spoke against it, not that the variable is there and nowhere else.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass

import torch

from interp.analyses import subspace_views as views
from interp.analyses.subspace_boundless import learn_boundless
from interp.analyses.subspace_das import Learnt, cosines, learn, random_labels
from interp.analyses.subspace_illusion import (
    FULL,
    MEANS,
    NULL,
    READ_NULL,
    READ_ROW,
    ROW,
    WHOLE,
    Examined,
    Patched,
    Verdict,
    examine,
    patched,
    verdict,
)
from interp.analyses.subspace_inputs import POSITION, SubspaceData, random_data, shared_answers, subspace_data
from interp.analyses.subspace_maths import Basis, Sides, interchange
from interp.analyses.subspace_site import SiteReader, find_site, output_matrix, shuffled
from interp.core.errors import InterpError
from interp.core.manifest import Manifest
from interp.core.result import LabelledTensor, Result
from interp.core.sites import Site
from interp.core.spec import Spec, Tolerance
from interp.instrument.guards import frozen
from interp.models.model import LoadedModel
from interp.tasks.library import check_accuracy


@dataclass(frozen=True, kw_only=True)
class SubspaceConfig:
    """Which variable, where, and how it is looked for."""

    task: str = POSITION
    """`ioi-position` (which of the two names came first), or a task whose corrupted prompts are the sources."""
    site: str = ""
    """resid_pre, resid_mid, resid_post, attn_out, mlp_out, neurons or z of a layer; empty: resid_post two thirds up."""
    role: str = "END"
    """Position that is patched: a role that lies at one place in all prompts."""
    n_train: int = 48
    """Pairs to learn on."""
    n_test: int = 48
    """Pairs to measure on, with other words."""
    k: int = 1
    """Directions; 0 learns how many as well (boundless), which takes a few hundred steps."""
    n_steps: int = 30
    """Steps of Adam, 16 pairs each."""
    lr: float = 0.02
    """Its rate."""
    n_random: int = 20
    """Random subspaces of as many directions."""
    rank_threshold: float = 1e-3
    """Singular values of W_out below this share of the largest count as 0."""
    min_accuracy: float = 0.75
    """Share of base prompts the model must get right; below it the run is refused."""
    seed: int = 0
    """Which prompts, which start of the search."""


def load(model: LoadedModel, cfg: SubspaceConfig) -> SubspaceData:
    """The pairs that the config names; no answer of the training pairs comes back in the test."""
    data = subspace_data(model, cfg.task, cfg.n_train, cfg.n_test, cfg.seed)
    if cfg.task == POSITION and (shared := shared_answers(data)):
        raise InterpError(f"{shared} answers of the training pairs are also answers of the test pairs")
    return data


def run(model: LoadedModel, data: SubspaceData, cfg: SubspaceConfig) -> Result:
    """Learn the subspace, measure it on held-out pairs, and test whether it is an illusion."""
    started = time.perf_counter()
    site = find_site(model, cfg.site)
    if cfg.n_random < 1:
        raise InterpError(f"n_random={cfg.n_random}; at least 1 random subspace is needed to compare with")
    accuracy = check_accuracy(model, data.test, cfg.min_accuracy)
    with frozen(model.module):
        test = SiteReader(model, data.test, site, cfg.role)
        train = SiteReader(model, data.train, site, cfg.role)
        sides = {"test": test.sides(data.test_label), "train": train.sides(data.train_label)}
        own = _learn(train, sides["train"], cfg)
        found = examine(
            test, sides["test"], sides["train"], own.basis, output_matrix(model, site),
            n_random=cfg.n_random, threshold=cfg.rank_threshold, seed=cfg.seed,
        )  # fmt: skip
        learned = _rivals(model, data, cfg, own, (train, test), sides)
    effects = views.effect_table(found, learned, cfg.seed)
    judged = verdict(found, [float(found.effects(learned.labels).mean())])
    return Result(
        headline=_headline(found, learned, judged, site, accuracy.interval.estimate),
        tables={
            "effects": effects,
            "bars": views.bars(effects),
            "illusion_test": views.test_table(found),
            "pairs": views.pair_table(found),
            "learning": views.learning_table(learned),
        },
        panels=views.PANELS,
        controls=views.controls(found, learned),
        manifest=_manifest(model, data, cfg, site, time.perf_counter() - started),
        tensors={"basis": LabelledTensor(values=own.basis.float(), axes=("direction", "dim"))},
        notes=(
            f"{len(data.train)} pairs to learn on, {len(data.test)} to measure on; base prompts: {accuracy}",
            judged.reason,
            *data.test.notes,
        ),
    )


def _learn(
    reader: SiteReader, sides: Sides, cfg: SubspaceConfig, *, seed: int | None = None, mixed: bool = False
) -> Learnt:
    """The search that the config names. mixed: with random labels."""
    flipped = random_labels(len(sides), cfg.seed) if mixed else torch.zeros(len(sides), dtype=torch.bool)
    label = "random labels" if mixed else "das"
    seed = cfg.seed if seed is None else seed
    if cfg.k:
        return learn(
            reader, sides, k=cfg.k, n_steps=cfg.n_steps, lr=cfg.lr, seed=seed, flipped=flipped, label=label
        )  # fmt: skip
    sign = 1 - 2 * flipped.double()
    return learn_boundless(reader, sides, n_steps=cfg.n_steps, lr=cfg.lr, seed=seed, sign=sign, label=label)


def _rivals(
    model: LoadedModel, data: SubspaceData, cfg: SubspaceConfig, own: Learnt, readers: tuple[SiteReader, SiteReader],
    sides: dict[str, Sides],
) -> views.Learned:  # fmt: skip
    """The same search with another start, with random labels, and in a random model."""
    train, test = readers

    def measured(basis: Basis, name: str) -> Patched:
        return patched(test, interchange(sides["test"], basis, basis), name)

    again = _learn(train, sides["train"], cfg, seed=cfg.seed + 1)
    mixed = _learn(train, sides["train"], cfg, mixed=True)
    return views.Learned(
        own=own,
        again=measured(again.basis, views.SEED),
        labels=measured(mixed.basis, views.LABELS),
        cosine_again=cosines(own.basis, again.basis),
        random_model_nats=_in_random_model(model, data, cfg, train.site),
        endpoint_error=_endpoint_error(model, data, test),
    )


def _in_random_model(model: LoadedModel, data: SubspaceData, cfg: SubspaceConfig, site: Site) -> float:
    """How far a subspace learnt in the shuffled model moves it on the held-out pairs, nats."""
    other = shuffled(model, cfg.seed)
    train, test = (SiteReader(other, pairs, site, cfg.role) for pairs in (data.train, data.test))
    sides = train.sides(data.train_label), test.sides(data.test_label)
    basis = _learn(train, sides[0], cfg).basis
    before = patched(test, sides[1].base, "").logit_diff
    return float((before - patched(test, interchange(sides[1], basis, basis), "").logit_diff).mean())


def _endpoint_error(model: LoadedModel, data: SubspaceData, test: SiteReader) -> float:
    """How far the patched path, with nothing patched, is from a whole forward of the model."""
    logits = model(data.test.clean)[:, -1]
    chosen = logits.gather(1, data.test.answers.to(logits.device))
    mine = patched(test, test.base, "").logit_diff
    return float(((chosen[:, 0] - chosen[:, 1]).double().cpu() - mine).abs().max())


def _headline(
    found: Examined, learned: views.Learned, judged: Verdict, site: Site, accuracy: float
) -> dict[str, object]:
    def effect(name: str) -> float | None:
        return found.effect(name) if name in found else None

    parts = found.split
    return {
        "site": str(site),
        "k": len(learned.own.basis),
        "trusted": judged.trusted,
        "reason": judged.reason,
        "accuracy_base": accuracy,
        "effect": found.effect(WHOLE),
        "interchange_accuracy": found[WHOLE].accuracy,
        "effect_full_component": effect(FULL),
        "effect_row": effect(ROW),
        "effect_null": effect(NULL),
        "effect_read_null": effect(READ_NULL),
        "effect_read_row": effect(READ_ROW),
        "effect_difference_of_means": effect(MEANS),
        "effect_random_labels": float(found.effects(learned.labels).mean()),
        "effect_other_seed": float(found.effects(learned.again).mean()),
        "cosine_other_seed": learned.cosine_again,
        "row_share": None if parts is None else parts.row_share,
        "rank": None if parts is None else parts.rank,
        "auc": found.auc,
        "auc_row": None if parts is None else parts.auc_row,
        "auc_null": None if parts is None else parts.auc_null,
        "distance": found.distance_patched / max(found.distance_clean, 1e-9),
    }


def _manifest(model: LoadedModel, data: SubspaceData, cfg: SubspaceConfig, site: Site, seconds: float) -> Manifest:
    return Manifest(
        method="subspace",
        model=model.record(),
        config=dataclasses.asdict(cfg),
        data={"name": cfg.task, "hash": data.hash, "n_train": len(data.train), "n_test": len(data.test)},
        sites=(str(site),),
        seeds=(cfg.seed,),
        metrics=METRICS,
        seconds=seconds,
    )


METRICS = {
    "effect": "v1: (LD_base - LD_patched) / LD_base, ratio of means over held-out pairs (fractional logit difference "
    "decrease); LD = logit(base's answer) - logit(answer wanted) at the last token",
    "interchange_accuracy": "v1: share of held-out pairs whose likeliest token is the answer wanted",
    "row_share": "v1: squared length of the directions in the row space of W_out, mean",
    "auc": "v1: area under the ROC curve of the classes of clean activations along the direction, at least 0.5",
    "distance": "v1: root mean square of standardised principal coordinates (20), patched over clean",
}


def example(model: LoadedModel) -> tuple[SubspaceData, SubspaceConfig]:
    """Random tokens at the hidden layer of an MLP."""
    cfg = SubspaceConfig(site="neurons.1", n_steps=2, n_random=3, min_accuracy=0.0, lr=0.1)
    return random_data(model, 6), cfg


SPEC = Spec(
    name="subspace",
    question="Which directions of an activation carry a variable, and are they what the model itself uses?",
    paper="Makelov, Lange and Nanda 2023, https://arxiv.org/abs/2311.17030",
    config=SubspaceConfig,
    load=load,
    run=run,
    example=example,
    metrics=METRICS,
    tolerances={
        "effect_null": Tolerance(absolute=1e-4),
        "cosine_other_seed": Tolerance(absolute=1e-2),
        "interchange_accuracy": Tolerance(absolute=0.05),
    },
)
