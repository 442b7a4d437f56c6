"""Replays: values a module computes in one fused call, computed again beside it.

A `Replay` repeats a module's computation from its inputs and weights and shows each value to a tap. If nobody edits,
the module's own output stays, bit for bit; the values are the replay's, and the probe compares its output with the
module's. If an edit changed a value, the output becomes the replay's wherever that differs from a replay without
edits. With gradients, the output keeps its bits and gets the replay's graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from interp.core.sites import Part, Site
from interp.models.family import ModuleCall, Reach
from interp.models.views import check_same


@dataclass(eq=False)
class Watcher:
    """One reader or writer of one site."""

    site: Site
    reach: Reach
    act: Callable[..., Any]
    heads: Sequence[int] | None = None
    grad: bool = False


class _Tap:
    """Shows values to writers, and gathers them for readers; values of single time steps are joined at the end."""

    def __init__(
        self,
        writers: Sequence[Watcher],
        readers: Sequence[Watcher],
        at_step: Callable[[int | None, int], None],
        *,
        grad: bool,
    ) -> None:
        self.writers, self.readers, self.at_step, self.grad = writers, readers, at_step, grad
        self.changed = False
        self.values: dict[tuple[Part, int | None], list[Tensor]] = {}
        self.probes: dict[tuple[Part, int | None], Tensor] = {}
        """Zeros that were added to values: their gradient is the values'."""

    def __call__(
        self, part: Part, value: Tensor, *, layer: int | None = None, step: int | None = None, n_steps: int = 1
    ) -> Tensor:
        """The value to go on with. Loops over time give a `step`, and a value (batch, 1, ...); stacks a `layer`."""
        mine = [entry for entry in self.writers if _meant(entry, part, layer)]
        for entry in mine:
            if step is not None:
                self.at_step(step, n_steps)
            new = check_same(str(entry.site), value, entry.act(value))
            self.changed |= new is not value
            value = new
        if mine and step is not None:
            self.at_step(None, n_steps)
        if any(_meant(entry, part, layer) for entry in self.readers):
            if self.grad:
                value = value + self._probe((part, layer), value, step, n_steps)
            self.values.setdefault((part, layer), []).append(value)
        return value

    def _probe(self, key: tuple[Part, int | None], value: Tensor, step: int | None, n_steps: int) -> Tensor:
        if key not in self.probes:
            shape = list(value.shape)
            shape[1] = value.shape[1] if step is None else n_steps
            self.probes[key] = value.new_zeros(shape, requires_grad=True)
        return self.probes[key] if step is None else self.probes[key][:, step : step + 1]

    def show(self) -> None:
        """Readers get each value, whole, with the tensor that collects its gradient."""
        for (part, layer), pieces in self.values.items():
            value = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
            for entry in [entry for entry in self.readers if _meant(entry, part, layer)]:
                entry.act(value, self.probes.get((part, layer), value))


def _meant(entry: Watcher, part: Part, layer: int | None) -> bool:
    return entry.site.part is part and (layer is None or entry.site.layer == layer)


def replayed(
    call: ModuleCall,
    writers: Sequence[Watcher],
    readers: Sequence[Watcher],
    at_step: Callable[[int | None, int], None],
    *,
    grad: bool,
) -> Any:
    """Replay the call for its readers and writers; the new output, or `None` if the module's own stays."""
    program = next(entry.reach.replay for entry in (*writers, *readers) if entry.reach.replay)
    seen = _Tap(writers, readers, at_step, grad=grad)
    again = program(call, seen)
    seen.show()
    output = call.output
    if grad:
        output = pytree.tree_map(_with_graph, output, again)
    if seen.changed:
        plain = program(call, _untouched)
        output = pytree.tree_map(_where_moved, output, again, plain)
    return output if grad or seen.changed else None


def _untouched(_part: Part, value: Tensor, **_: Any) -> Tensor:
    return value


def _with_graph(own: Any, again: Any) -> Any:
    """The module's own bits with the replay's gradients."""
    return own.detach() + (again - again.detach()) if isinstance(own, Tensor) and own.is_floating_point() else own


def _where_moved(own: Any, again: Any, plain: Any) -> Any:
    return torch.where(again == plain, own, again.to(own)) if isinstance(own, Tensor) else own
