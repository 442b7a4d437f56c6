"""The hook hub: the one owner of torch hooks on a model.

Captures and edits do not hook modules themselves. They register readers and writers for sites here, and the hub
keeps one torch hook per place: writers run in the order they were added, readers after them, so a capture always
sees the edited value. When the last reader and writer of a place is gone, so is the hook. Hooks of others are never
touched. The hub also knows about the forward call that is running: how many positions it has, how many are in the
cache, which are padding. It is longer than other files because all state of a running forward is here and nowhere else.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from interp.core.errors import InterpError, SiteError
from interp.core.sites import Part, Site
from interp.models.attending import attended
from interp.models.attention import AttentionCall, Later, tap
from interp.models.calls import Call, call_of
from interp.models.carry import Carry
from interp.models.family import ModuleCall, Reach
from interp.models.inside import OpCall, OpScope
from interp.models.parameters import shadow
from interp.models.replays import Watcher, into_graph, replayed
from interp.models.table import FamilyTable
from interp.models.views import Arguments, Frame, check_same, read, replaced, select, view_of, write

Writer = Callable[[Tensor], Tensor]
Reader = Callable[[Tensor, Tensor], None]
"""Gets the site's view and the raw tensor it is a view of."""


class StopForward(BaseException):
    """Raised inside a forward once everything asked for has been seen; `LoadedModel` catches it."""


@dataclass(eq=False)
class _Place:
    """The readers and writers of one (module, side)."""

    key: tuple[Any, ...]
    writers: list[Watcher] = field(default_factory=list[Watcher])
    readers: list[Watcher] = field(default_factory=list[Watcher])
    remove: Callable[[], None] = lambda: None
    forward: int = 0
    """Number of the forward in which it was last replayed."""
    n_calls: int = 0
    """Replays in that forward."""

    @property
    def wants_grad(self) -> bool:
        return any(entry.grad for entry in self.readers)


class HookHub:
    """Readers and writers of one model."""

    def __init__(self, module: nn.Module, table: FamilyTable) -> None:
        self.module, self.table = module, table
        self.call: Call | None = None
        self.prompt: int | None = None
        """Set by `LoadedModel.generate` for its duration."""
        self.seen = 0
        """Positions this generation has computed so far."""
        self.n_forward = 0
        """Number of the forward that is running, from 1."""
        self.held: set[int] = set()
        """Memory that an open capture refers to."""
        self.generation = 0
        """How many generations there have been."""
        self.stoppable = False
        """Whether a `StopForward` would be caught."""
        self.stoppers = 0
        """Open captures that are content once their sites have fired."""
        self._outer: Call | None = None
        self.pending: list[Callable[[], bool]] = []
        """One per open context: whether it still waits for a site (or forbids stopping)."""
        self._places: dict[tuple[Any, ...], _Place] = {}
        self._scopes: dict[str, OpScope] = {}
        self._carries: dict[str, Carry] = {}
        self._root: list[RemovableHandle] = []
        self._thread = 0
        """Who has readers or writers here."""

    def add_writer(self, site: Site, writer: Writer) -> Callable[[], None]:
        """Edit a site: the writer gets its view and returns a new one of equal shape. Returns what undoes it."""
        reach = self.table.reach(site)
        if reach.instead:
            raise SiteError(f"{site} can only be read; edit {replace(site, part=reach.instead)}, from which it follows")
        place, entry = self._place(reach), Watcher(site, reach, writer)
        place.writers.append(entry)
        let_go = self._carry(site, reach) if reach.carry else None

        def undo() -> None:
            place.writers.remove(entry)
            if let_go:
                let_go()
            self._clean(place)

        return undo

    def add_reader(
        self,
        site: Site,
        reader: Reader,
        heads: Sequence[int] | None = None,
        *,
        grad: bool = False,
        later: Callable[[Later], None] | None = None,
    ) -> Callable[[], None]:
        """Watch a site, after all edits. `heads` limits what is recomputed for scores and patterns; with `grad` the
        value is made part of the graph, and the reader gets the tensor whose gradient `of_gradient` understands.
        `later` gets scores and patterns that nobody edits, instead of the reader, without their being computed.
        """
        reach = self.table.reach(site)
        place, entry = self._place(reach), Watcher(site, reach, reader, heads, grad, later)
        place.readers.append(entry)

        def undo() -> None:
            place.readers.remove(entry)
            self._clean(place)

        return undo

    def of_gradient(self, site: Site, gradient: Tensor, n_rows: int) -> Tensor:
        """The site's view of the gradient of the raw tensor its reader was given."""
        reach = self.table.reach(site)
        if reach.side in ("replay", "attention"):
            return gradient
        return view_of(self._frame(self.table.module.get_submodule(reach.path), reach, n_rows), gradient)

    @contextmanager
    def within(self, call: Call) -> Generator[None, None, None]:
        """Part of a model run by hand counts as this call."""
        self._one_thread()
        before, self.call = self.call, call
        self.n_forward += 1
        for carry in self._carries.values():
            carry.forget()
        try:
            yield
        finally:
            self.call = before

    def stop_if_done(self) -> None:
        """End the forward if nobody waits for more."""
        if not (self.stoppable and self.stoppers) or any(scope.undecided for scope in self._scopes.values()):
            return
        if not any(waits() for waits in self.pending):
            raise StopForward

    def abort(self) -> None:
        """The forward has ended, however it did; one that another thread tried to begin is not this one."""
        if self._places and self._thread != threading.get_ident():
            return
        for scope in reversed(self._scopes.values()):
            scope.stop()
        self.call = None

    def _place(self, reach: Reach) -> _Place:
        self._one_thread()
        name = reach.item if reach.side == "parameter" else None
        key = (self.table.canonical(reach.path), reach.side, reach.op, reach.nth, reach.of, reach.replay, name)
        place = self._places.get(key)
        if place is None:
            place = _Place(key)
            place.remove = self._install(place, reach)
            self._places[key] = place
        if not self._root:
            self._root = [
                self.module.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True),
                self.module.register_forward_hook(lambda *_: self.abort(), always_call=True),
            ]
        return place

    def _install(self, place: _Place, reach: Reach) -> Callable[[], None]:
        module = self.table.at(reach.path)
        if reach.side == "attention":
            return tap(module, lambda call, output: self._attend(place, call, output))
        if reach.side == "op":
            return self._watch(place, reach, module)
        if reach.side == "parameter":
            return shadow(module, str(reach.item), lambda value: self._pass(place, module, value))
        if reach.side == "replay":

            def again(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
                self._leave(reach.path)
                return self._replay(place, self._module_call(module, args, kwargs, output))

            # First, so that who watches the output sees what an edit inside made of it.
            return module.register_forward_hook(again, with_kwargs=True, prepend=True).remove
        if reach.side == "output":

            def after(module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
                self._leave(reach.path)
                return self._pass(place, module, output)

            # On the model itself, before the hook that ends the call.
            return module.register_forward_hook(after, prepend=not reach.path).remove

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self._pass(place, module, Arguments((args, kwargs)))

        return module.register_forward_pre_hook(before, with_kwargs=True).remove

    def _module_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> ModuleCall:
        n_rows = self.call.n_rows if self.call else None
        return ModuleCall(module=module, args=args, kwargs=kwargs, output=output, n_rows=n_rows)

    def _watch(self, place: _Place, reach: Reach, module: nn.Module) -> Callable[[], None]:
        if reach.path not in self._scopes:
            self._scopes[reach.path] = OpScope(module)
        scope = self._scopes[reach.path]
        call = OpCall(str(reach.op), reach.nth, reach.of, reach.only)
        undo = scope.watch(call, partial(self._pass, place, module))

        def remove() -> None:
            undo()
            if not scope.watched:
                scope.remove()
                del self._scopes[reach.path]

        return remove

    def _leave(self, path: str) -> None:
        """The module has returned: what hooks compute from here on is not its own."""
        if path in self._scopes:
            self._scopes[path].stop()

    def _frame(self, module: nn.Module, reach: Reach, n_rows: int | None) -> Frame:
        n_pos = self.call.n_pos if self.call else None
        reach = replace(reach, view=reach.single) if reach.single and n_pos == 1 else reach
        return Frame(module=module, reach=reach, n_heads=self.table.n_split(reach), n_rows=n_rows, n_pos=n_pos)

    def _pass(self, place: _Place, module: nn.Module, value: Any) -> Any:
        """Run writers, then readers; the new value, or `None` if it is unchanged.

        The stream comes first: where a sublayer reads it without a norm, its input is the stream as edited.
        """
        original = value
        if not place.writers and len(place.readers) == 1 and place.readers[0].as_it_is:  # few steps: it is often here
            entry = place.readers[0]
            raw = value if isinstance(value, Tensor) else select(entry.reach, value)
            entry.act(raw, raw)
        else:
            stream = {entry.reach.carry is not None for entry in (*place.writers, *place.readers)}
            for carried in sorted(stream, reverse=True):
                value = self._run(place, module, value, carried=carried)
        self.stop_if_done()
        if value is original:
            return None
        for scope in self._scopes.values():
            scope.follow(original, value)
        return value

    def _run(self, place: _Place, module: nn.Module, value: Any, *, carried: bool) -> Any:
        n_rows = self.call.n_rows if self.call else None
        for entry in [entry for entry in place.writers if (entry.reach.carry is not None) is carried]:
            frame = self._frame(module, entry.reach, n_rows)
            old, _ = read(frame, value)
            new = entry.act(old)
            if new is old:
                continue
            value = write(frame, value, check_same(str(entry.site), old, new))
            if entry.reach.carry:
                self._carries[entry.reach.carry].stream = read(frame, value)[1]
        for entry in [entry for entry in place.readers if (entry.reach.carry is not None) is carried]:
            frame = self._frame(module, entry.reach, n_rows)
            view, raw = read(frame, value)
            if entry.grad and raw.is_floating_point():
                shared = entry.reach.side == "input" or not raw.requires_grad  # others may read the same tensor
                if shared and not (entry.reach.carry or entry.reach.whole):
                    value, raw = replaced(frame, value, raw.view_as(raw))
                into_graph(raw)
                if entry.reach.whole:  # the view is computed beside the value: put it in the path
                    value = write(frame, value, view)
                else:
                    view = view_of(frame, raw)
            entry.act(view if entry.heads is None else view[:, :, list(entry.heads)], raw)
        return value

    def _replay(self, place: _Place, call: ModuleCall) -> Any:
        place.n_calls = place.n_calls + 1 if place.forward == self.n_forward else 0
        place.forward = self.n_forward
        call = replace(call, number=place.n_calls)
        output = replayed(call, place.writers, place.readers, self._at_step, grad=place.wants_grad)
        self.stop_if_done()
        return output

    def _at_step(self, steps: range | None, n_steps: int | None) -> None:
        """Tell edits which time step they see, captures which steps; `None` puts the call of the whole model back.

        Steps are positions, also where the model's input has none, or has its time first. While generating they go on
        behind the cache.
        """
        if steps is None:
            self.call, self._outer = self._outer, None
            return
        outer = self._outer = self._outer or self.call
        if outer is not None and outer.prompt is not None:
            self.call = replace(outer, n_pos=len(steps), past=outer.past + steps.start)
            return
        mask = outer.mask if outer and outer.mask is not None and outer.mask.shape[1] == n_steps else None
        rows = outer.n_rows if outer else 1
        self.call = Call(n_rows=rows, n_pos=len(steps), past=steps.start, mask=mask, prompt=n_steps)

    def _attend(self, place: _Place, call: AttentionCall, output: Tensor) -> Tensor:
        past = self.call.past if self.call else None
        n_gone = max(0, self.call.past + self.call.n_pos - call.key.shape[2]) if self.call else 0
        output = attended(call, output, place.writers, place.readers, n_gone, past, grad=place.wants_grad)
        self.stop_if_done()
        return output

    def _carry(self, site: Site, reach: Reach) -> Callable[[], None]:
        """Have the block's output follow an edited stream while somebody edits it; returns what undoes this."""
        path = str(reach.carry)
        carry = self._carries.setdefault(path, Carry())
        carry.users += 1
        if carry.users == 1:
            place = self._place(Reach(path=path))
            entry = Watcher(Site(Part.MODULE, path=path), Reach(path=path), carry.join)
            place.writers.insert(0, entry)
            stop_reading = self.add_reader(replace(site, part=reach.carry_plus), carry.keep)

            def stop() -> None:
                stop_reading()
                place.writers.remove(entry)
                self._clean(place)

            carry.stop = stop

        def undo() -> None:
            carry.users -= 1
            if not carry.users:
                del self._carries[path]
                carry.stop()

        return undo

    def _one_thread(self) -> None:
        """Values of two forwards at once could not be told apart, so all of it happens in one thread."""
        if self._places and self._thread != threading.get_ident():
            raise InterpError(
                "this model is being captured or edited in another thread; give each thread a model of its own, "
                "or a lock around the block and the calls (DataParallel runs replicas in threads: use its .module)"
            )
        self._thread = threading.get_ident()

    def _begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._one_thread()
        self.abort()
        self.n_forward += 1
        for carry in self._carries.values():
            carry.forget()
        self.call = call_of(args, kwargs, self.prompt, self.generation, self.seen)
        if self.call and self.prompt is not None:
            self.seen = self.call.past + self.call.n_pos

    def _clean(self, place: _Place) -> None:
        if not place.writers and not place.readers and self._places.pop(place.key, None):
            place.remove()
        if not self._places:
            for handle in self._root:
                handle.remove()
            self._root, self.call = [], None
            self.held.clear()
