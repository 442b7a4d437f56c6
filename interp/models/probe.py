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
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from interp.core.errors import InterpError
from interp.core.seed import torch_generator
from interp.core.sites import Part, Site
from interp.models.family import OWNER, ModuleCall
from interp.models.model import LoadedModel
from interp.models.replays import untouched as no_tap

N_PROBE_TOKENS = 12
"""Tokens of the probe's random input: two rows, long enough that a pattern is not trivial."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was checked."""

    name: str
    site: str
    value: float
    """Largest difference; relative to the largest magnitude where the tolerance is not 0."""
    tolerance: float
    passed: bool
    note: str = ""


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


def tolerance(dtype: torch.dtype) -> float:
    """Rounding of one matrix product in this dtype, relative: 1e-5 in float32, as the method cards ask."""
    return {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)


def probe_tokens(model: LoadedModel, n_rows: int = 2) -> Int[Tensor, "batch pos"]:
    """Random tokens from the vocabulary; the same for every run."""
    size = model.dims.d_vocab
    if size is None:
        raise InterpError(f"{model.source} has no vocabulary; pass the probe an input of your own")
    return torch.randint(size, (n_rows, N_PROBE_TOKENS), generator=torch_generator(0, "probe")).to(model.device)


def probe_pixels(model: LoadedModel, n_rows: int = 2) -> Float[Tensor, "batch channel height width"]:
    """Random images of the size that the model takes; the same for every run."""
    config: Any = getattr(model.module, "config", None)
    size = getattr(config, "image_size", getattr(model.module, "input_image_size", None))
    if size is None:
        raise InterpError(f"{model.source} takes images of any size; pass the probe an input of your own")
    height, width = (size, size) if isinstance(size, int) else size
    shape = (n_rows, getattr(config, "num_channels", 3), height, width)
    return torch.randn(shape, generator=torch_generator(0, "probe")).to(model.device, model.dtype)


def probe_inputs(model: LoadedModel) -> Tensor:
    """Tokens or images, as the network takes them; an error for one that says neither."""
    images = model.takes_pixels or hasattr(model.module, "input_image_size")
    return probe_pixels(model) if images else probe_tokens(model)


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
    checks = [_check("captured logits equal the untouched model's", "logits", difference, 0.0)]
    missing = [site for site in sites if site not in values]
    if model.table.family is not None:
        checks += [_check("the site fires", str(site), 1.0, 0.0) for site in missing]
        checks += list(_identities(model, values)) if not missing else []
    checks += list(_shapes(model, values, inputs))
    checks += list(_rules(model, values, tolerance(model.dtype)))
    checks += list(_replays(model, inputs)) if full else []
    if full:
        fired = [site for site in sites if site in values and not model.table.reach(site).instead]
        checks.append(_write_back(model, inputs, untouched, fired))
        checks += list(_edits(model, inputs, untouched, fired))
    return ProbeReport(
        source=model.source,
        family=model.table.name,
        max_abs_diff=difference,
        n_sites=len(sites),
        checks=tuple(checks),
        unfired=tuple(str(site) for site in missing),
        silent=_silent(model, inputs) if full else (),
    )


def _replays(model: LoadedModel, inputs: Any) -> Iterator[Check]:
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
            pairs = zip(_tensors(output), _tensors(program(call, no_tap)), strict=True)
            found.extend((path, _distance(again, own)) for own, again in pairs if own.is_floating_point())

        hooks.append(model.table.module.get_submodule(path).register_forward_hook(look, with_kwargs=True))
    keep = model.hub.add_reader(model.table.sites[0], lambda _view, _raw: None) if reaches else lambda: None
    try:
        model(inputs)
    finally:
        keep()
        for hook in hooks:
            hook.remove()
    for path, difference in found:
        yield _check("the replay returns what the module returned", path, difference, tolerance(model.dtype))


def _tensors(output: Any) -> list[Tensor]:
    """The tensors of an output, in order; a packed sequence is its data."""
    leaves = pytree.tree_leaves(output, is_leaf=lambda item: isinstance(item, PackedSequence))
    values = [leaf.data if isinstance(leaf, PackedSequence) else leaf for leaf in leaves]
    return [value for value in values if isinstance(value, Tensor)]


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


def _check(name: str, site: str, value: float, limit: float, note: str = "") -> Check:
    return Check(name=name, site=site, value=value, tolerance=limit, passed=value <= limit, note=note)


def _tensor(output: object) -> Tensor:
    """Logits, or whatever tensor the model returns first."""
    found = getattr(output, "logits", getattr(output, "last_hidden_state", output))
    tensors = _tensors(found)
    if not tensors:
        raise InterpError(f"the model returns {type(output).__name__}; the probe needs a tensor in it")
    return tensors[0]


def _untouched(model: LoadedModel, inputs: Any) -> Tensor:
    """The module's own answer, called with no hook of ours anywhere."""
    args, named = model.arguments(inputs)
    with torch.no_grad():
        return _tensor(model.module(*args, **named))


def _capture_all(model: LoadedModel, inputs: Any, sites: list[Site], values: dict[Site, Tensor]) -> Tensor:
    def keep(site: Site, value: Tensor) -> None:
        values.setdefault(site, value.detach().clone())

    undo = [model.hub.add_reader(site, lambda value, _raw, site=site: keep(site, value)) for site in sites]
    try:
        return _tensor(model(inputs))
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
            yield _check("shape as the vocabulary says", str(site), 1.0, 0.0, note)


LINEAR = (
    (Part.Q, Part.ATTN_IN, "W_Q"),
    (Part.K, Part.ATTN_IN, "W_K"),
    (Part.V, Part.ATTN_IN, "W_V"),
    (Part.GATE_PRE, Part.MLP_IN, "W_gate"),
    (Part.UP, Part.MLP_IN, "W_up"),
    (Part.NEURONS_PRE, Part.MLP_IN, "W_in"),
    (Part.ATTN_OUT, Part.Z, "W_O"),
    (Part.MLP_OUT, Part.NEURONS, "W_down"),
    (Part.ROUTER_LOGITS, Part.MLP_IN, "W_router"),
    (Part.SHARED_GATE_PRE, Part.MLP_IN, "W_shared_gate"),
    (Part.SHARED_UP, Part.MLP_IN, "W_shared_up"),
    (Part.SHARED_OUT, Part.SHARED_NEURONS, "W_shared_down"),
)
"""(result, input, weight): result == input @ weight + bias; what is added to the stream, through the norm after it."""

SUMS = (
    (Part.RESID_MID, Part.RESID_PRE, Part.ATTN_OUT),
    (Part.RESID_POST, Part.RESID_MID, Part.MLP_OUT),
)
"""(stream, stream before, what was added)."""


def _identities(model: LoadedModel, values: dict[Site, Tensor]) -> Iterator[Check]:
    limit = tolerance(model.dtype)
    for layer in range(model.n_layers):
        local = {s.part: value for s, value in values.items() if s.layer == layer and s.path is None}
        yield from _linear(model, layer, local, limit)
        for stream, before, added in SUMS:
            if {stream, before, added} <= set(local):
                name = f"{before} + {added} == {stream}"
                yield _close(name, f"{stream}.{layer}", local[before] + local[added], local[stream], limit)
        yield from _gate(model, layer, local, limit)
        after = values.get(Site(Part.RESID_PRE, layer + 1)) if layer + 1 < model.n_layers else None
        if after is not None and Part.RESID_POST in local:
            family = model.table.family
            scale = family.stream_scale(model.module, layer) if family and family.stream_scale else 1
            difference = float((local[Part.RESID_POST] * scale - after).abs().max())
            yield _check("resid_post is the next block's resid_pre", f"resid_post.{layer}", difference, 0.0)
        of_family = model.table.family.rules if model.table.family else ()
        if Part.PATTERN in local and all(rule.result is not Part.PATTERN for rule in of_family):
            rows = local[Part.PATTERN].sum(-1)
            yield _close("pattern rows sum to 1", f"pattern.{layer}", rows, torch.ones_like(rows), limit)
        if {Part.PATTERN, Part.V, Part.Z} <= set(local):
            mixed, name = _mix(local), "pattern @ v == z"
            if Part.ATTN_GATE in local:
                mixed, name = mixed * local[Part.ATTN_GATE], "attn_gate * (pattern @ v) == z"
            yield _close(name, f"pattern.{layer}", mixed, local[Part.Z], limit)
    final = values.get(Site(Part.FINAL_NORM))
    name = Part.LOGITS_PRE if Site(Part.LOGITS_PRE) in values else Part.LOGITS
    logits = values.get(Site(name))
    if final is not None and logits is not None:
        yield _close(f"final_norm @ W_U == {name}", str(name), _product(model, "W_U", None, final), logits, limit)


def _rules(model: LoadedModel, values: dict[Site, Tensor], limit: float) -> Iterator[Check]:
    """Identities of the family and of known blocks, wherever all their parts are."""
    table = model.table
    groups: dict[tuple[str | None, int | None], dict[Part, Tensor]] = {}
    for site, value in values.items():
        if site.part is not Part.MODULE:
            groups.setdefault((site.path, site.layer), {})[site.part] = value
    for (path, layer), local in groups.items():
        rules = table.blocks[path].rules if path is not None else table.family.rules if table.family else ()
        for rule in rules:
            if {rule.result, *rule.inputs} <= set(local):
                site = Site(rule.result, layer, path=path)
                with torch.no_grad():
                    left = rule.function(table.part_module(site), *(local[part] for part in rule.inputs))
                yield _close(rule.text, str(site), left, local[rule.result], limit)


def _linear(model: LoadedModel, layer: int, local: dict[Part, Tensor], limit: float) -> Iterator[Check]:
    """Products with the weights as the table hands them out: this proves the table's weights too."""
    family = model.table.family
    for result, source, weight in LINEAR:
        if family is None or not model.table.has_weight(weight, layer) or not {result, source} <= set(local):
            continue
        left = _product(model, weight, layer, local[source])
        after = {Part.ATTN_OUT: family.after_attn, Part.MLP_OUT: family.after_mlp}.get(result)
        after = _owner(model, Site(result, layer)) if after == OWNER else after
        left = _run(model, after, layer, left) if after else left
        reach = model.table.reach(Site(result, layer))
        if result in (Part.Q, Part.K) and reach.path.endswith("_norm"):  # normed head by head, or all heads at once
            heads = local[result].shape[-2:]
            left = _run(model, reach.path, layer, left if reach.heads else left.unflatten(-1, heads))
            left = left if reach.heads else left.flatten(-2)
        right = local[result].flatten(-2) if result in (Part.Q, Part.K, Part.V) else local[result]
        yield _close(f"{source} @ {weight} == {result}", f"{result}.{layer}", left, right, limit)


def _gate(model: LoadedModel, layer: int, local: dict[Part, Tensor], limit: float) -> Iterator[Check]:
    act = model.table.family.act if model.table.family else None
    if {Part.GATE, Part.UP, Part.NEURONS} <= set(local):
        product = local[Part.GATE] * local[Part.UP]
        yield _close("gate * up == neurons", f"neurons.{layer}", product, local[Part.NEURONS], limit)
    for before, result in ((Part.GATE_PRE, Part.GATE), (Part.NEURONS_PRE, Part.NEURONS)):
        if act and act.format(layer=layer) in model.table.modules and {before, result} <= set(local):
            name, left = f"act({before}) == {result}", _run(model, act, layer, local[before])
            yield _close(name, f"{result}.{layer}", left, local[result], limit)


def _product(model: LoadedModel, name: str, layer: int | None, x: Tensor) -> Tensor:
    weight, bias = model.weight(name, layer).detach(), model.table.bias(name, layer)
    left = x.flatten(-2) @ weight.flatten(0, 1) if weight.ndim == 3 else x @ weight
    return left if bias is None else left + bias.detach()


def _owner(model: LoadedModel, site: Site) -> str | None:
    """The norm whose hook point the site is; `None` if it is a hook point of something else."""
    owner = model.table.canonical(model.table.reach(site).path).rpartition(".")[0]
    return owner if "norm" in type(model.module.get_submodule(owner)).__name__.lower() else None


def _run(model: LoadedModel, path: str, layer: int, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.module.get_submodule(path.format(layer=layer))(x)


def _mix(local: dict[Part, Tensor]) -> Tensor:
    pattern, values = local[Part.PATTERN], local[Part.V]
    group = pattern.shape[1] // values.shape[2]
    return torch.einsum("bhqk,bkhd->bqhd", pattern, values.repeat_interleave(group, dim=2))


def _close(name: str, site: str, left: Tensor, right: Tensor, limit: float) -> Check:
    return _check(name, site, _distance(left, right), limit)


def _distance(left: Tensor, right: Tensor) -> float:
    """Largest difference, relative to the largest magnitude on the right."""
    return float((left - right).abs().max()) / (float(right.abs().max()) or 1.0)


def _write_back(model: LoadedModel, inputs: Any, untouched: Tensor, sites: list[Site]) -> Check:
    """Reading every site and writing back a copy must move no bit of the output."""
    undo = [model.hub.add_writer(site, lambda value: value.clone()) for site in sites]
    try:
        difference = float((_tensor(model(inputs)) - untouched).abs().max())
    finally:
        for remove in undo:
            remove()
    return _check("writing back what was read changes nothing", "every site", difference, 0.0)


def _edits(model: LoadedModel, inputs: Any, untouched: Tensor, sites: list[Site]) -> Iterator[Check]:
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
        return _tensor(model(inputs))
    finally:
        for remove in undo:
            remove()
