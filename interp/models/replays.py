"""Replays: values a module computes in one fused call, computed again beside it.

A `Replay` repeats a module's computation from its inputs and weights and shows each value to a tap. If nobody edits,
the module's own output stays, bit for bit; the values are the replay's, and the probe compares its output with the
module's. If an edit changed a value, the output becomes the replay's wherever that differs from a replay without
edits. With gradients, the output keeps its bits and gets the replay's graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from interp.core.sites import Part, Site
from interp.models.attention import Later
from interp.models.family import ModuleCall, Reach
from interp.models.views import check_same

AtStep = Callable[[range | None, int | None], None]
"""Says which time steps of how many come next; `None` ends that."""
ENDLESS = 2**40
"""Number of steps of a cell that is called in a loop: nobody knows when the loop ends."""


@dataclass(eq=False)
class Watcher:
    """One reader or writer of one site."""

    site: Site
    reach: Reach
    act: Callable[..., Any]
    heads: Sequence[int] | None = None
    grad: bool = False
    later: Callable[[Later], None] | None = None
    as_it_is: bool = field(init=False)
    """Whether the site's view is the tensor itself."""

    def __post_init__(self) -> None:
        reach = self.reach
        views = (reach.view, reach.single, reach.flat, reach.recent, reach.chunk, reach.heads, reach.head_major)
        self.as_it_is = not any((*views, reach.whole, self.grad)) and self.heads is None

    def means(self, part: Part, layer: int | None, branch: str) -> bool:
        """Whether a value that a replay shows is this site's."""
        site = self.site
        return (
            site.part is part
            and (layer is None or site.layer == layer)
            and (site.path or "").partition("@")[2] == branch
        )


@dataclass(eq=False)
class _Seen:
    """The pieces of one value, by time step."""

    pieces: dict[int, Tensor]
    n_steps: int | None
    stepped: bool
    probe: Tensor | None = None
    """Zeros that were added to the value: their gradient is the value's."""


class _Tap:
    """Shows values to writers, and gathers them for readers; values of single time steps are joined at the end."""

    def __init__(self, writers: Sequence[Watcher], readers: Sequence[Watcher], at_step: AtStep, *, grad: bool) -> None:
        self.writers, self.readers, self.at_step, self.grad = writers, readers, at_step, grad
        self.changed = False
        self.seen: dict[tuple[Part, int | None, str], _Seen] = {}

    def __call__(
        self,
        part: Part,
        value: Tensor,
        *,
        layer: int | None = None,
        branch: str = "",
        step: int | None = None,
        n_steps: int | None = None,
    ) -> Tensor:
        """The value to go on with. Loops over time give a `step`, in whatever order, and a value (batch, 1, ...);
        a module that is called once for every step does not know `n_steps`. Stacks give a `layer`.
        """
        mine = [entry for entry in self.writers if entry.means(part, layer, branch)]
        if mine and step is not None:
            self.at_step(range(step, step + 1), ENDLESS if n_steps is None else n_steps)
        for entry in mine:
            new = check_same(str(entry.site), value, entry.act(value))
            self.changed |= new is not value
            value = new
        if mine and step is not None:
            self.at_step(None, None)
        if any(entry.means(part, layer, branch) for entry in self.readers):
            value = self._keep((part, layer, branch), value, step, n_steps)
        return value

    def _keep(self, key: tuple[Part, int | None, str], value: Tensor, step: int | None, n_steps: int | None) -> Tensor:
        seen = self.seen.setdefault(key, _Seen({}, n_steps, stepped=step is not None))
        if self.grad:
            if seen.probe is None:
                shape = list(value.shape)
                shape[1:2] = shape[1:2] if n_steps is None else [n_steps]
                seen.probe = value.new_zeros(shape, requires_grad=True)
            at = slice(None) if step is None or n_steps is None else slice(step, step + 1)
            value = value + seen.probe[:, at]
        seen.pieces[step or 0] = value
        return value

    def show(self) -> None:
        """Readers get each value, whole, with the tensor that collects its gradient."""
        for key, seen in self.seen.items():
            pieces = [seen.pieces[step] for step in sorted(seen.pieces)]
            value = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
            if seen.stepped:
                first = min(seen.pieces)
                self.at_step(range(first, first + value.shape[1]), None)
            for entry in [entry for entry in self.readers if entry.means(*key)]:
                entry.act(value, value if seen.probe is None else seen.probe)
            if seen.stepped:
                self.at_step(None, None)


def replayed(
    call: ModuleCall, writers: Sequence[Watcher], readers: Sequence[Watcher], at_step: AtStep, *, grad: bool
) -> Any:
    """Replay the call for its readers and writers; the new output, or `None` if the module's own stays."""
    program = next(entry.reach.replay for entry in (*writers, *readers) if entry.reach.replay)
    seen = _Tap(writers, readers, at_step, grad=grad)
    again = program(call, seen)
    seen.show()
    output = call.output
    if grad:
        output = _over_tensors(_with_graph, output, again)
    if seen.changed:
        plain = program(call, untouched)
        output = _over_tensors(_where_moved, output, again, plain)
    return output if grad or seen.changed else None


def untouched(_part: Part, value: Tensor, **_: Any) -> Tensor:
    """The tap of a replay at which nobody looks."""
    return value


def _over_tensors(function: Callable[..., Any], own: Any, *others: Any) -> Any:
    """The function applied to each tensor of an output, wherever it is in it."""

    def one(own: Any, *others: Any) -> Any:
        if isinstance(own, PackedSequence):
            data = function(own.data, *(other.data for other in others))
            return PackedSequence(data, own.batch_sizes, own.sorted_indices, own.unsorted_indices)
        return function(own, *others)

    return pytree.tree_map(one, own, *others, is_leaf=lambda item: isinstance(item, PackedSequence))


def _with_graph(own: Any, again: Any) -> Any:
    """The module's own bits with the replay's gradients."""
    return own.detach() + (again - again.detach()) if isinstance(own, Tensor) and own.is_floating_point() else own


def _where_moved(own: Any, again: Any, plain: Any) -> Any:
    return torch.where(again == plain, own, again.to(own)) if isinstance(own, Tensor) else own


def into_graph(value: Tensor) -> None:
    """Have autograd keep the gradient of this tensor."""
    if value.requires_grad:
        value.retain_grad()
    else:
        value.requires_grad_()
