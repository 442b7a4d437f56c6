"""What every family must pass, on its tiny model: capture, edit, gradient, generation.

`tests/models/test_families.py` runs these for every tiny model there is, and `python -m tests.test_readme` writes the
README's matrix from the same four functions. Each returns how many sites it proved, or raises.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from interp.core.seed import torch_generator
from interp.core.sites import Part, Site
from interp.instrument.capture import capture
from interp.instrument.edits import Edit, edited
from interp.models.model import LoadedModel, Stopped
from interp.models.probe import probe_tokens, verify


@dataclass(frozen=True)
class Outcome:
    """How many of a model's sites passed one of the four."""

    passed: int
    asked: int


def check_capture(model: LoadedModel) -> Outcome:
    """The probe passes: every site fires with its shape, identities hold, writing back moves no bit."""
    report = verify(model)
    assert report.passed, report.first_failure
    assert report.max_abs_diff == 0
    return Outcome(report.n_sites, report.n_sites)


def check_edit(model: LoadedModel) -> Outcome:
    """Adding noise at a site changes the output, and a capture beside it sees the edited value."""
    inputs, sites = probe_tokens(model), editable(model)
    plain = model(inputs)
    for site in sites:
        values: list[Tensor] = []

        def noise(x: Tensor, _context: object, site: Site = site, values: list[Tensor] = values) -> Tensor:
            values.append(x + _noise(x, site))
            return values[-1]

        with capture(model, site, stop=False) as acts, edited(model, [Edit(site, noise)]):
            changed = model(inputs)
        assert not torch.equal(changed, plain), site
        seen = torch.cat(values, dim=1) if len(values) > 1 else values[0]
        allowed = seen.abs() < 1e30  # masked scores stay masked
        assert torch.allclose(acts[site][allowed], seen[allowed], rtol=1e-5, atol=1e-6), site
    return Outcome(len(sites), len(sites))


def check_gradient(model: LoadedModel) -> Outcome:
    """The gradient at a site predicts how the loss moves with the site (central differences), in two directions:

    along the gradient itself, where nothing cancels, and along noise, which sees what the gradient leaves out.
    """
    inputs, sites = probe_tokens(model), editable(model)
    model.module.requires_grad_(requires_grad=False)
    target = torch.randn(model(inputs).shape, generator=torch_generator(5, "target"))
    for site in sites:
        with capture(model, site, grad=True) as acts:
            (model(inputs) * target).sum().backward()
        value, gradient, noise = acts[site].detach(), acts.grad(site), _noise(acts[site].detach(), site)
        along = torch.where(noise == 0, 0, gradient)
        along = along / along.norm() * noise.norm()
        for step, scale in ((along, gradient.norm() * along.norm()), (noise, gradient.norm() * _rms(noise))):
            predicted = float((gradient * step).sum())
            errors = [
                abs(_slope(model, site, inputs, target, step, size) - predicted) / float(scale)
                for size in (1e-1, 1e-2, 1e-3)
            ]
            assert float(scale) > 0 and min(errors) < (0.01 if step is along else 0.1), (site, predicted, errors)
            assert value.shape == gradient.shape, site
    return Outcome(len(sites), len(sites))


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def check_generation(model: LoadedModel, n_new: int = 4) -> Outcome:
    """Capture and edit while generating: the cache on equals the cache off, and a plain forward on the result."""
    prompt, sites = probe_tokens(model), list(model.table.sites)
    asked = [site for site in sites if site.part not in (Part.LOGITS_PRE, Part.LOGITS, Part.CLASS_LOGITS)]
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
    """Sites that can be written."""
    return [site for site in model.table.sites if not model.table.reach(site).instead]


def _noise(x: Tensor, site: Site) -> Tensor:
    """Small, in proportion to the values, and never where scores or patterns are masked, or an expert is off."""
    allowed = (x.abs() < 1e30) & ((x != 0) | (site.part not in (Part.PATTERN, Part.ROUTER_WEIGHTS)))
    scale = x[allowed].abs().mean() + 0.05
    noise = torch.randn(x.shape, generator=torch_generator(3, str(site), *x.shape)).to(x)
    return torch.where(allowed, noise * scale * 0.1, 0)


def _by_position(x: Tensor, context: object) -> Tensor:
    """Noise that depends on the position alone, so that it is the same with and without a cache."""
    where: Tensor = context.where  # type: ignore[attr-defined]
    axis = 2 if context.site.part in (Part.PATTERN, Part.ATTN_SCORES) else 1  # type: ignore[attr-defined]
    shape = [1] * x.ndim
    shape[axis] = -1
    allowed = x.abs() < 1e30
    return torch.where(allowed, torch.sin(where.float() * 3 + 1).view(shape).to(x) * 0.2, 0)


def _slope(model: LoadedModel, site: Site, inputs: Tensor, target: Tensor, step: Tensor, size: float) -> float:
    ends = [_moved_loss(model, site, inputs, target, step * size * sign) for sign in (1, -1)]
    return (ends[0] - ends[1]) / (2 * size)


def _moved_loss(model: LoadedModel, site: Site, inputs: Tensor, target: Tensor, step: Tensor) -> float:
    starts = iter(range(step.shape[1] if step.ndim > 1 else 1))

    def move(x: Tensor, _context: object) -> Tensor:
        if x.shape == step.shape:
            return x + step
        start = next(starts)  # a recurrence hands over one time step after another
        return x + step[:, start : start + 1]

    with edited(model, [Edit(site, move)]):
        output = model(inputs)
    assert not isinstance(output, Stopped)
    return float((output * target).double().sum())
