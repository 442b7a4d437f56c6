"""The probe: proof that every site means what its name says, and that looking changes nothing.

`quick_check` runs at load: shapes of every site, logits bit-equal with all of them captured, the cheap identities.
`verify` runs everything: also, writing back what was read moves no bit, and editing each site moves the logits.

Identities (each at every layer): `mlp_in @ W_gate == gate_pre`, `act(gate_pre) == gate`, `gate * up == neurons`,
`neurons @ W_down == mlp_out` and `z @ W_O == attn_out` (through the norm after the sublayer where there is one), the
residual sums close, rows of the pattern sum to 1, `pattern @ v == z`, `final_norm @ W_U == logits`. The products use
the table's weights, so these are proven too. A tolerance is relative to the largest value.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from interp.core.errors import InterpError
from interp.core.sites import Site
from interp.models.checks import Check, check, first_tensor, tolerance
from interp.models.disturb import edits, mixtures, replays, write_back
from interp.models.identities import identities, rules
from interp.models.model import LoadedModel
from interp.models.probe_inputs import probe_inputs, probe_pixels, probe_tokens

__all__ = [
    "Check", "ProbeReport", "captured", "probe_inputs", "probe_pixels", "probe_tokens", "quick_check", "tolerance",
    "verify",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ProbeReport:
    """What the probe found."""

    source: str
    family: str
    max_abs_diff: float
    """Logits with every site captured against the untouched model's; exactly 0 or the model is refused."""
    n_sites: int
    checks: tuple[Check, ...]
    unfired: tuple[str, ...] = field(default=())
    """Sites that never fired."""
    silent: tuple[str, ...] = field(default=())
    """Modules without children that a forward does not run: a function uses their weights, or nothing does."""

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def first_failure(self) -> Check | None:
        return next((check for check in self.checks if not check.passed), None)


def quick_check(model: LoadedModel) -> ProbeReport:
    """The cheap part, for load. Raises InterpError naming the first site that is not what it should be."""
    if model.table.family is None:
        return ProbeReport(source=model.source, family="generic", max_abs_diff=0.0, n_sites=0, checks=())
    report = _report(model, probe_inputs(model), full=False)
    failure = report.first_failure
    if failure is not None:
        raise InterpError(
            f"{model.source} fails the probe at {failure.site}: {failure.name} is off by {failure.value:.3g} "
            f"(tolerance {failure.tolerance:g}); load with check=False and run `interp verify` for all of it"
        )
    return report


def verify(model: LoadedModel, inputs: Any = None, *, reference: LoadedModel | nn.Module | None = None) -> ProbeReport:
    """Check everything. `inputs` are token ids, images, or any input of a network without a table.

    With a `reference`, the same network in another form, also every value that both have: a TransformerBridge against
    the Hugging Face model, quantised weights against the original. See `interp.models.compare`.
    """
    given = probe_inputs(model) if inputs is None else inputs
    report = _report(model, given, full=True)
    if reference is None:
        return report
    from interp.models.compare import compare

    return replace(report, checks=(*report.checks, *compare(model, reference, given)))


def _report(model: LoadedModel, inputs: Any, *, full: bool) -> ProbeReport:
    untouched = _untouched(model, inputs)
    if model.module.training and not torch.equal(_untouched(model, inputs), untouched):
        raise InterpError(f"{model.source} is in training mode and gives another answer each time; call .eval() on it")
    sites, values = list(model.table.sites), dict[Site, Tensor]()
    seen = _capture_all(model, inputs, sites, values)
    difference = float((seen - untouched).abs().max())
    checks = [check("captured logits equal the untouched model's", "logits", difference, 0.0)]
    missing = [site for site in sites if site not in values]
    if model.table.family is not None:
        checks += [check("the site fires", str(site), 1.0, 0.0) for site in missing]
        checks += list(identities(model, values)) if not missing else []
    checks += list(_shapes(model, values, inputs))
    checks += list(rules(model, values, inputs, tolerance(model.dtype)))
    checks += list(replays(model, inputs)) if full else []
    if full:
        fired = [site for site in sites if site in values and not model.table.reach(site).instead]
        checks.append(write_back(model, inputs, untouched, fired))
        checks += list(edits(model, inputs, untouched, fired))
        checks += list(mixtures(model, inputs))
    return ProbeReport(
        source=model.source,
        family=model.table.name,
        max_abs_diff=difference,
        n_sites=len(sites),
        checks=tuple(checks),
        unfired=tuple(str(site) for site in missing),
        silent=_silent(model, inputs) if full else (),
    )


def _silent(model: LoadedModel, inputs: Any) -> tuple[str, ...]:
    leaves = {path: module for path, module in model.table.modules.items() if not list(module.children())}
    fired: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda _m, _a, _o, path=path: fired.add(path)) for path, module in leaves.items()
    ]
    try:
        model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(path for path in leaves if path not in fired)


def _untouched(model: LoadedModel, inputs: Any) -> Tensor:
    """The module's own answer, called with no hook of ours anywhere."""
    args, named = model.arguments(inputs)
    with torch.no_grad():
        return first_tensor(model.module(*args, **named))


def _capture_all(model: LoadedModel, inputs: Any, sites: list[Site], values: dict[Site, Tensor]) -> Tensor:
    def keep(site: Site, value: Tensor) -> None:
        values.setdefault(site, value.detach().clone())

    undo = [model.hub.add_reader(site, lambda value, _raw, site=site: keep(site, value)) for site in sites]
    try:
        return first_tensor(model(inputs))
    finally:
        for remove in undo:
            remove()


def captured(model: LoadedModel, inputs: Any, sites: list[Site]) -> dict[Site, Tensor]:
    """Each site's value in one forward, the first time it fires."""
    values: dict[Site, Tensor] = {}
    _capture_all(model, inputs, sites, values)
    return values


def _shapes(model: LoadedModel, values: dict[Site, Tensor], inputs: Any) -> Iterator[Check]:
    given: dict[str, int] = {}
    if model.table.family is not None:  # what the axes of any other network's input mean, nobody knows
        n_rows, n_pos = inputs.shape[:2]
        given = {"batch": n_rows} | ({"pos": n_pos, "query": n_pos, "key": n_pos} if inputs.ndim == 2 else {})
    for site, value in values.items():
        axes = model.table.axes(site)
        gap = axes.index("...") if "..." in axes else len(axes)
        first, after = [
            [given.get(axis, model.dims.size(axis)) for axis in part] for part in (axes[:gap], axes[gap + 1 :])
        ]
        expected = (*first, *after)
        known = [*zip(value.shape, first, strict=False), *zip(value.shape[::-1], after[::-1], strict=False)]
        fits = value.ndim >= len(expected) if "..." in axes else value.ndim == len(expected)
        if not fits or any(wanted not in (None, size) for size, wanted in known):
            named = dict(zip([axis for axis in axes if axis != "..."], expected, strict=True))
            note = f"{tuple(value.shape)} instead of {named}"
            yield check("shape as the vocabulary says", str(site), 1.0, 0.0, note)
