"""The probe's interventions: writing back moves no bit, a large change moves the output, replays equal the module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from interp.core.seed import torch_generator
from interp.core.sites import Part, Site
from interp.models.checks import Check, check, close, distance, first_tensor, tensors, tolerance
from interp.models.family import ModuleCall
from interp.models.model import LoadedModel
from interp.models.replays import untouched as no_tap


def replays(model: LoadedModel, inputs: Any) -> Iterator[Check]:
    """What a replay computes must be what the module returned: its values are no others than the module's own."""
    reaches = {(r.path, r.replay) for site in model.table.sites if (r := model.table.reach(site)).replay}
    found: list[tuple[str, float]] = []
    hooks: list[Any] = []
    for path, program in reaches:

        def look(
            module: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path, program: Any = program
        ) -> None:
            rows = model.hub.call.n_rows if model.hub.call else None
            call = ModuleCall(module=module, args=args, kwargs=kwargs, output=output, n_rows=rows)
            pairs = zip(tensors(output), tensors(program(call, no_tap)), strict=True)
            found.extend((path, distance(again, own)) for own, again in pairs if own.is_floating_point())

        hooks.append(model.table.module.get_submodule(path).register_forward_hook(look, with_kwargs=True))
    keep = model.hub.add_reader(model.table.sites[0], lambda _view, _raw: None) if reaches else lambda: None
    try:
        model(inputs)
    finally:
        keep()
        for hook in hooks:
            hook.remove()
    for path, difference in found:
        yield check("the replay returns what the module returned", path, difference, tolerance(model.dtype))


def write_back(model: LoadedModel, inputs: Any, untouched: Tensor, sites: list[Site]) -> Check:
    """Reading every site and writing back a copy must move no bit of the output."""
    undo = [model.hub.add_writer(site, lambda value: value.clone()) for site in sites]
    try:
        difference = float((first_tensor(model(inputs)) - untouched).abs().max())
    finally:
        for remove in undo:
            remove()
    return check("writing back what was read changes nothing", "every site", difference, 0.0)


def edits(model: LoadedModel, inputs: Any, untouched: Tensor, sites: list[Site]) -> Iterator[Check]:
    """A large change at each site must move the output. One row per layer, so one forward per part.

    A network of no known family gets its own input, site by site: its rows may not be its first axis.
    """
    groups: dict[Part, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.part, []).append(site)
    for part, members in groups.items():
        if part is Part.MODULE or model.table.family is None or model.table.axes(members[0])[0] != "batch":
            for site in members:
                yield _moved(site, _disturbed(model, inputs, [(site, None)]), untouched, slice(None))
            continue
        rows = inputs[:1].expand(len(members), *[-1] * (inputs.ndim - 1))
        changed = _disturbed(model, rows, [(site, row) for row, site in enumerate(members)])
        for row, site in enumerate(members):
            yield _moved(site, changed, untouched[:1], slice(row, row + 1))


def mixtures(model: LoadedModel, inputs: Any) -> Iterator[Check]:
    """A gate between two branches: at 1/4, the block returns 1/4 of what it returns at 1 and 3/4 of that at 0."""
    for path, block in model.table.blocks.items():
        part = block.mixes
        if part is None or part not in block.parts:
            continue
        site = Site(part, path=path)
        closed, quarter, opened = (_with_gate(model, inputs, site, share) for share in (0.0, 0.25, 1.0))
        if None in (closed, quarter, opened):
            continue  # it did not run: said elsewhere
        assert closed is not None and quarter is not None and opened is not None
        limit = tolerance(model.dtype)
        yield close(f"the output is affine in {part}", str(site), 0.25 * opened + 0.75 * closed, quarter, limit)


def _with_gate(model: LoadedModel, inputs: Any, site: Site, share: float) -> Tensor | None:
    """What the block returns the first time, with its gate set to one number everywhere."""
    kept: list[Tensor] = []
    module = model.table.part_module(site)
    undo = model.hub.add_writer(site, lambda value: torch.full_like(value, share))
    handle = module.register_forward_hook(lambda _m, _a, output: kept.append(first_tensor(output).detach().clone()))
    try:
        model(inputs)
    finally:
        handle.remove()
        undo()
    return kept[0] if kept else None


def _moved(site: Site, changed: Tensor, untouched: Tensor, rows: slice) -> Check:
    moved = float((changed[rows] - untouched).abs().max() / untouched.abs().max().clamp_min(1e-30))
    return Check(
        name="editing the site moves the logits", site=str(site), value=moved, tolerance=1e-4, passed=moved > 1e-4
    )


def _disturbed(model: LoadedModel, inputs: Any, where: list[tuple[Site, int | None]]) -> Tensor:
    """The output with noise added at each site, in its row only; values that have one sign keep it."""

    def writer(value: Tensor, site: Site, row: int | None) -> Tensor:
        index = ... if row is None else slice(row, row + 1)
        part = value[index]
        noise = torch.randn(part.shape, generator=torch_generator(1, str(site))).to(part)
        scale = part.clamp_min(-1e4).abs().mean() + 0.1
        moved = part.clamp_min(-1e4) + scale * noise
        if bool((part >= 0).all()):  # a decay above 1, or the root of a negative number, proves nothing
            moved = moved.abs()
        elif bool((part <= 0).all()):
            moved = -moved.abs()
        new = value.clone()
        new[index] = moved
        return new

    undo = [
        model.hub.add_writer(site, lambda value, site=site, row=row: writer(value, site, row)) for site, row in where
    ]
    try:
        return first_tensor(model(inputs))
    finally:
        for remove in undo:
            remove()
