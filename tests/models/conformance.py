"""What every family must pass, on its tiny model: capture, edit, gradient, generation.

`tests/models/test_families.py` runs these for every tiny model there is, and `python -m tests.test_readme` writes the
README's matrix from the same four functions. Each returns how many sites it proved, or raises. Networks of no known
family (`tests/models/test_blocks.py`) bring inputs of their own; there the sites of their blocks are proved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interp.core.seed import torch_generator
from interp.core.sites import Part, Site
from interp.instrument.capture import Activations, capture
from interp.instrument.edits import Context, Edit, edited
from interp.models.model import LoadedModel, Stopped
from interp.models.probe import probe_inputs, probe_tokens, verify


@dataclass(frozen=True)
class Outcome:
    """How many of a model's sites passed one of the four."""

    passed: int
    asked: int


def check_capture(model: LoadedModel, inputs: Any = None) -> Outcome:
    """The probe passes: every site fires with its shape, identities hold, writing back moves no bit."""
    report = verify(model, inputs)
    assert report.passed, report.first_failure
    assert not report.unfired
    assert report.max_abs_diff == 0
    return Outcome(report.n_sites, report.n_sites)


def check_edit(model: LoadedModel, inputs: Any = None) -> Outcome:
    """Adding noise at a site changes the output, and a capture beside it sees the edited value."""
    inputs, sites = probe_inputs(model) if inputs is None else inputs, editable(model)
    plain = model(inputs)
    for site in sites:
        values: dict[int, Tensor] = {}

        def noise(x: Tensor, context: Context, site: Site = site, values: dict[int, Tensor] = values) -> Tensor:
            return values.setdefault(int(context.where[0]), x + _noise(x, site))

        with capture(model, site, stop=False) as acts, edited(model, [Edit(site, noise)]):
            changed = model(inputs)
        assert not torch.equal(changed, plain), site
        seen = _joined([values[step] for step in sorted(values)])  # a recurrence may run backwards
        allowed = seen.abs() < 1e30  # masked scores stay masked
        assert torch.allclose(_joined(acts.calls(site))[allowed], seen[allowed], rtol=1e-5, atol=1e-6), site
    return Outcome(len(sites), len(sites))


def check_gradient(model: LoadedModel, inputs: Any = None) -> Outcome:
    """The gradient at a site predicts how the loss moves with the site (central differences), in two directions:

    along the gradient itself, where nothing cancels, and along noise, which sees what the gradient leaves out.
    """
    inputs, sites = probe_inputs(model) if inputs is None else inputs, editable(model)
    model.module.requires_grad_(requires_grad=False)
    target = torch.randn(model(inputs).shape, generator=torch_generator(5, "target"))
    for site in sites:
        with capture(model, site, grad=True) as acts:
            (model(inputs) * target).sum().backward()
        value, gradient = _joined(acts.calls(site)).detach(), _gradient(model, acts, site)
        noise = _noise(value, site)
        along = torch.where(noise == 0, 0, gradient)
        along = along / along.norm() * noise.norm()
        for step, scale in ((along, gradient.norm() * along.norm()), (noise, gradient.norm() * _rms(noise))):
            predicted = float((gradient * step).sum())
            errors = [
                abs(_slope(model, site, inputs, target, step, size) - predicted) / float(scale)
                for size in (1e-1, 1e-2, 1e-3, 1e-4)  # a choice of experts may flip within a larger one
            ]
            errors = [
                error for error in errors if not math.isnan(error)
            ]  # a gate may leave its range and give no number
            assert float(scale) > 0 and min(errors) < (0.01 if step is along else 0.1), (site, predicted, errors)
            assert value.shape == gradient.shape, site
    return Outcome(len(sites), len(sites))


def _joined(pieces: list[Tensor]) -> Tensor:
    """One tensor of a site that fired once, or once a time step."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _gradient(model: LoadedModel, acts: Activations, site: Site) -> Tensor:
    """The gradient of every firing, joined like the values."""
    records = acts.records[site]
    found = [record.raw.grad for record in records if record.raw is not None and record.raw.grad is not None]
    assert len(found) == len(records), site
    views = [
        model.hub.of_gradient(site, grad, len(record.value) if record.value.ndim else 1)
        for grad, record in zip(found, records, strict=True)
    ]
    return _joined(views)


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def check_generation(model: LoadedModel, n_new: int = 4) -> Outcome:
    """Capture and edit while generating: the cache on equals the cache off, and a plain forward on the result."""
    prompt, sites = probe_tokens(model), list(model.table.sites)
    asked = [
        site
        for site in sites
        if site.part not in (Part.LOGITS_PRE, Part.LOGITS, Part.CLASS_LOGITS)
        and model.table.reach(site).side != "parameter"  # the same at every step
    ]
    with capture(model, asked) as cached:
        tokens = model.generate(prompt, n_new=n_new)
    with capture(model, asked) as recomputed:
        assert torch.equal(model.generate(prompt, n_new=n_new, use_cache=False), tokens)
    with capture(model, asked, stop=False) as forward:
        model(tokens[:, :-1])
    for site in asked:
        whole = forward[site]
        if not whole.is_floating_point():
            assert torch.equal(cached[site], whole) and torch.equal(recomputed[site], whole), site
            continue
        scale = float(whole[whole.abs() < 1e30].abs().max()) + 1e-6
        for seen in (cached[site], recomputed[site]):
            allowed = whole.abs() < 1e30
            assert seen.shape == whole.shape, (site, seen.shape, whole.shape)
            assert float((seen - whole)[allowed].abs().max()) < 1e-3 * scale, site
    changing = editable(model)
    for site in changing[:: max(1, len(changing) // 12)]:
        noise = Edit(site, lambda x, c: x + _by_position(x, c))
        with edited(model, [noise]):
            one = model.generate(prompt, n_new=n_new)
        with edited(model, [noise]):
            other = model.generate(prompt, n_new=n_new, use_cache=False)
        assert torch.equal(one, other), site
    return Outcome(len(asked), len(asked))


def editable(model: LoadedModel) -> list[Site]:
    """Sites that can be written: those with a name, not every module of a network."""
    named = [site for site in model.table.sites if site.part is not Part.MODULE]
    return [site for site in named if not model.table.reach(site).instead]


def _noise(x: Tensor, site: Site) -> Tensor:
    """Small, in proportion to the values, and never where scores or patterns are masked, or an expert is off."""
    allowed = (x.abs() < 1e30) & ((x != 0) | (site.part not in (Part.PATTERN, Part.ROUTER_WEIGHTS)))
    scale = x[allowed].abs().mean() + 0.05
    noise = torch.randn(x.shape, generator=torch_generator(3, str(site), *x.shape)).to(x)
    return torch.where(allowed, noise * scale * 0.1, 0)


def _by_position(x: Tensor, context: object) -> Tensor:
    """Noise that depends on the position alone, so that it is the same with and without a cache."""
    if x.ndim == 1:  # a parameter
        return torch.full_like(x, 0.2)
    where: Tensor = context.where  # type: ignore[attr-defined]
    axis = 2 if context.site.part in (Part.PATTERN, Part.ATTN_SCORES) else 1  # type: ignore[attr-defined]
    shape = [1] * x.ndim
    shape[axis] = -1
    allowed = x.abs() < 1e30
    return torch.where(allowed, torch.sin(where.float() * 3 + 1).view(shape).to(x) * 0.2, 0)


def _slope(model: LoadedModel, site: Site, inputs: Any, target: Tensor, step: Tensor, size: float) -> float:
    ends = [_moved_loss(model, site, inputs, target, step * size * sign) for sign in (1, -1)]
    return (ends[0] - ends[1]) / (2 * size)


def _moved_loss(model: LoadedModel, site: Site, inputs: Any, target: Tensor, step: Tensor) -> float:
    def move(x: Tensor, context: Context) -> Tensor:
        if x.shape == step.shape:
            return x + step
        start = int(context.where[0])  # a recurrence hands over one time step after another
        return x + step[:, start : start + 1]

    with edited(model, [Edit(site, move)]):
        output = model(inputs)
    assert not isinstance(output, Stopped)
    return float((output * target).double().sum())
