"""Where a rank is: the collectives it has entered, noted as it enters them.

The process group of each mesh axis is wrapped (`wrapped_groups.py`), so that whatever communicates along an
axis (a node of the program, its backward, the trainer) is seen, and nothing in the program changes. A note
costs microseconds; sentences are made of notes when somebody asks.

The layer is known in both directions. Forward, hooks say which region is running. Backward, the autograd
engine says which node is running, and a node has the sequence number it got in the forward of its region.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd import _get_sequence_nr  # type: ignore[attr-defined]

from moec.ir import region_of
from moec.runtime.wrapped_groups import OPERATIONS, wrapped_axes

#: How many entries along one axis are remembered; a rank is never further ahead of another than that.
REMEMBERED = 8


@dataclass(frozen=True, slots=True)
class Entry:
    """A collective that a rank entered: the `number`-th along its axis."""

    axis: str
    op: str
    number: int
    step: int
    layer: str
    direction: str

    def __str__(self) -> str:
        layer = f" in {self.layer}" if self.layer else ""
        return f"{self.op} over {self.axis}{layer} ({self.direction}, step {self.step})"


class Trail:
    """The notes of one rank; `step`, which may be set anew, tells the step that is being taken.

    Written by the thread that trains, read by the one that watches.
    """

    def __init__(self, step: Callable[[], int] = lambda: 0) -> None:
        self.step = step
        self._entries: dict[str, deque[Entry]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        self._counts: dict[str, int] = defaultdict(int)
        self._region, self._inside = "", False
        self._bounds: list[int] = []  # sequence numbers at which another region begins …
        self._names: list[str] = []  # … and which
        self.last: Entry | None = None

    @property
    def length(self) -> int:
        """How many collectives were entered, along all axes."""
        return sum(list(self._counts.values()))

    def count(self, axis: str) -> int:
        """How many collectives were entered along `axis`."""
        return self._counts.get(axis, 0)

    def recent(self, axis: str) -> list[Entry]:
        """The last entries along `axis`, oldest first."""
        return list(self._entries[axis]) if axis in self._entries else []

    def enter(self, axis: str, op: str) -> None:
        """Note that this rank enters `op` along `axis` now."""
        self._counts[axis] = number = self._counts[axis] + 1
        layer, direction = self._place()
        self.last = Entry(axis, op, number, self.step(), layer, direction)
        self._entries[axis].append(self.last)

    def _place(self) -> tuple[str, str]:
        node = torch._C._current_autograd_node()
        if node is None:
            return self._region, "forward" if self._inside else "outside of the layers"
        if self._region:  # computed again
            return self._region, "backward"
        place = bisect_right(self._bounds, node._sequence_nr()) - 1
        return self._names[place] if place >= 0 else "", "backward"

    @contextmanager
    def follow(self, root: nn.Module) -> Iterator[None]:
        """Know the regions of the graph `root` by name while inside, by hooks on its modules."""
        hooks = [root.register_forward_pre_hook(self._begin), root.register_forward_hook(self._finish)]
        for module in root.modules():
            region = region_of(module)
            if region is not None:
                hooks += self._follow_region(module, region.name)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _follow_region(self, module: nn.Module, name: str) -> list[Any]:
        def enter(*_: object) -> None:
            self._cross(name)

        def leave(*_: object) -> None:
            self._cross("")

        return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]

    def overhear(self, root: nn.Module, whose: str) -> None:
        """Know the regions of a graph that only runs forward, in between: `the teacher's moe_3`. The hooks go
        with the graph, which is not held."""

        def enter(name: str) -> Callable[..., None]:
            def note(*_: object) -> None:
                self._region, self._inside = f"{whose} {name}", True

            return note

        def leave(*_: object) -> None:
            self._region, self._inside = "", False

        for module in root.modules():
            region = region_of(module)
            if region is not None:
                module.register_forward_pre_hook(enter(region.name))
                module.register_forward_hook(leave)

    def _cross(self, region: str) -> None:
        self._region = region
        if torch._C._current_autograd_node() is None:  # a recomputation has numbers that no backward runs
            self._bounds.append(_get_sequence_nr())
            self._names.append(region)

    def _begin(self, *_: object) -> None:
        self._inside, self._region = True, ""
        if torch._C._current_autograd_node() is None:
            self._bounds, self._names = [], []

    def _finish(self, *_: object) -> None:
        self._inside = False


@contextmanager
def watched_axes(axes: list[str], trail: Trail) -> Iterator[None]:
    """Note in `trail` all that goes along `axes`, whose groups are registered already, while inside."""

    def note(_: object, axis: str, method: str, __: object) -> None:
        trail.enter(axis, OPERATIONS[method])

    with wrapped_axes(axes, note):
        yield
