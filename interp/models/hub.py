"""The hook hub: the one owner of torch hooks on a model.

Captures and edits do not hook modules themselves. They register readers and writers for sites here, and the hub
keeps one torch hook per place: writers run in the order they were added, readers after them, so a capture always
sees the edited value. When the last reader and writer of a place is gone, so is the hook. Hooks of others are never
touched. The hub also knows about the forward call that is running: how many positions it has, how many are in the
cache, which are padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from interp.core.sites import Part, Site
from interp.models.attention import AttentionCall, softmax, tap
from interp.models.table import FamilyTable, Reach
from interp.models.views import check_same, first_tensor, read, replace_first, write

Writer = Callable[[Tensor], Tensor]
Reader = Callable[[Tensor, Tensor], None]
"""Gets the site's view and the raw tensor it is a view of."""


class StopForward(BaseException):
    """Raised inside a forward once everything asked for has been seen; `LoadedModel` catches it."""


@dataclass(frozen=True)
class Call:
    """One forward call of the whole model."""

    n_pos: int
    past: int
    """Positions already in the key-value cache."""
    mask: Tensor | None
    """Bool (batch, past + pos): True where there is a real token; `None` where all are."""
    prompt: int | None
    """Length of the prompt while generating, else `None`."""
    generation: int = 0
    """Which generation of this model it belongs to."""


@dataclass
class _Place:
    """The readers and writers of one (module, side)."""

    writers: list[tuple[Site, Reach, Writer]] = field(default_factory=list[tuple[Site, Reach, Writer]])
    readers: list[tuple[Site, Reach, Reader, Sequence[int] | None]] = field(
        default_factory=list[tuple[Site, Reach, Reader, Sequence[int] | None]]
    )
    carried: list[Tensor] = field(default_factory=list[Tensor])
    remove: Callable[[], None] = lambda: None


class HookHub:
    """Readers and writers of one model."""

    def __init__(self, module: nn.Module, table: FamilyTable) -> None:
        self.module, self.table = module, table
        self.call: Call | None = None
        self.prompt: int | None = None
        """Set by `LoadedModel.generate` for its duration."""
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
        self.pending: list[Callable[[], bool]] = []
        """One per open context: whether it still waits for a site (or forbids stopping)."""
        self._places: dict[tuple[str, str], _Place] = {}
        self._root: list[RemovableHandle] = []

    def add_writer(self, site: Site, writer: Writer) -> Callable[[], None]:
        """Edit a site: the writer gets its view and returns a new one of equal shape. Returns what undoes it."""
        reach = self.table.reach(site)
        place, entry = self._place(reach), (site, reach, writer)
        place.writers.append(entry)
        carry = (Site(Part.MODULE, path=reach.carry), Reach(path=reach.carry), _same) if reach.carry else None
        if carry:
            self._place(carry[1]).writers.append(carry)

        def undo() -> None:
            _drop(place.writers, entry)
            if carry:
                _drop(self._place(carry[1]).writers, carry)
            self._clean()

        return undo

    def add_reader(self, site: Site, reader: Reader, heads: Sequence[int] | None = None) -> Callable[[], None]:
        """Watch a site, after all edits. `heads` limits what is recomputed for scores and patterns."""
        reach = self.table.reach(site)
        place, entry = self._place(reach), (site, reach, reader, heads)
        place.readers.append(entry)

        def undo() -> None:
            _drop(place.readers, entry)
            self._clean()

        return undo

    def stop_if_done(self) -> None:
        """End the forward if nobody waits for more."""
        if self.stoppable and self.stoppers and not any(waits() for waits in self.pending):
            raise StopForward

    def _place(self, reach: Reach) -> _Place:
        key = (reach.path, reach.side)
        if key not in self._places:
            place = _Place()
            place.remove = self._install(place, reach)
            self._places[key] = place
        if not self._root:
            self._root = [
                self.module.register_forward_pre_hook(self._begin, with_kwargs=True),
                self.module.register_forward_hook(self._end, always_call=True),
            ]
        return self._places[key]

    def _install(self, place: _Place, reach: Reach) -> Callable[[], None]:
        module = self.table.module.get_submodule(reach.path)
        if reach.side == "attention":
            return tap(module, lambda call, output: self._attend(place, call, output))
        if reach.side == "output":
            return module.register_forward_hook(lambda _m, _a, out: self._pass(place, reach.path, out)).remove

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                changed = self._pass(place, reach.path, args[0])
                return None if changed is None else ((changed, *args[1:]), kwargs)
            name = next((key for key, value in kwargs.items() if isinstance(value, Tensor)), None)
            changed = self._pass(place, reach.path, kwargs[name]) if name else None
            return None if changed is None else (args, {**kwargs, name: changed})

        return module.register_forward_pre_hook(before, with_kwargs=True).remove

    def _pass(self, place: _Place, path: str, value: Any) -> Any:
        """Run writers, then readers; the new value, or `None` if it is unchanged."""
        raw = original = first_tensor(value, path)
        while place.carried:
            raw = raw + place.carried.pop(0)
        for site, reach, writer in place.writers:
            n_heads = self.table.n_split(reach)
            old = read(reach, raw, n_heads)
            new = writer(old)
            if new is old:
                continue
            before, raw = raw, write(reach, raw, check_same(str(site), old, new), n_heads)
            if reach.carry:
                self._place(Reach(path=reach.carry)).carried.append(raw - before)
        for _, reach, reader, heads in list(place.readers):
            view = read(reach, raw, self.table.n_split(reach))
            reader(view if heads is None else view[:, :, list(heads)], raw)
        self.stop_if_done()
        return None if raw is original else replace_first(value, raw)

    def _attend(self, place: _Place, call: AttentionCall, output: Tensor) -> Tensor:
        past = self.call.past if self.call else None
        n_gone = max(0, self.call.past + self.call.n_pos - call.key.shape[2]) if self.call else 0
        if place.writers:
            scores = call.scores(None, n_gone, past)
            plain = softmax(scores)
            rewritten = self._rewrite(place, Part.ATTN_SCORES, scores)
            masked = scores == torch.finfo(scores.dtype).min
            changed_scores = scores if rewritten is scores else torch.where(masked, scores, rewritten)
            before = plain if changed_scores is scores else softmax(changed_scores)
            pattern = self._rewrite(place, Part.PATTERN, before)
            moved = (pattern != plain).any(dim=3).transpose(1, 2)
            if bool(moved.any()):
                output = torch.where(moved[..., None], call.outputs(pattern[..., n_gone:]), output)
            known = {Part.ATTN_SCORES: changed_scores, Part.PATTERN: pattern}
            for site, _, reader, heads in list(place.readers):
                value = known[site.part]
                reader(value if heads is None else value[:, list(heads)], value)
        else:
            made: dict[tuple[int, ...] | None, Tensor] = {}
            for site, _, reader, heads in list(place.readers):
                key = None if heads is None else tuple(heads)
                if key not in made:
                    made[key] = call.scores(heads, n_gone, past)
                value = made[key] if site.part is Part.ATTN_SCORES else softmax(made[key])
                reader(value, value)
        self.stop_if_done()
        return output

    def _rewrite(self, place: _Place, part: Part, value: Tensor) -> Tensor:
        for site, _, writer in place.writers:
            if site.part is part:
                value = check_same(str(site), value, writer(value))
        return value

    def _begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.n_forward += 1
        for place in self._places.values():
            place.carried.clear()
        ids = next(
            (x for x in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args) if isinstance(x, Tensor)), None
        )
        if ids is None or ids.ndim < 2:
            self.call = None
            return
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        mask = kwargs.get("attention_mask")
        mask = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self.call = Call(n_pos=ids.shape[1], past=past, mask=mask, prompt=self.prompt, generation=self.generation)

    def _end(self, *_: Any) -> None:
        self.call = None

    def _clean(self) -> None:
        for key, place in list(self._places.items()):
            if not place.writers and not place.readers:
                place.remove()
                del self._places[key]
        if not self._places:
            for handle in self._root:
                handle.remove()
            self._root, self.call = [], None
            self.held.clear()


def _same(value: Tensor) -> Tensor:
    return value


def _drop(entries: list[Any], entry: Any) -> None:
    """Remove exactly this entry, by identity."""
    for index, candidate in enumerate(entries):
        if candidate is entry:
            del entries[index]
            return
