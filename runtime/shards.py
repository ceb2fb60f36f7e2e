"""Who updates what: gradients summed, weights updated in stretches, and put together again.

Ranks that hold the same weights (`Placement.holders`) need not all keep the averages of AdamW for all of
them. Each takes an equal stretch of the weights, laid end to end; it gets the sum of the gradients of its
stretch, updates it, and receives the stretches of the others. Dense weights are dealt out over the world,
those of experts over the ranks that hold the same experts.

    gradients  ──reduce_scatter──▶  stretch of the sum  ──AdamW──▶  stretch of the weights  ──all_gather──▶

The stretches of all ranks hold every element of every parameter once, so the square of the norm of the whole
gradient is the sum of those of the stretches, on any mesh.

Source: Rajbhandari et al. 2019, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", the
first stage. Why no library does it here: docs/decisions/optimizer-shards.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moec.runtime.ops.packed import PACKED

_collectives = torch.ops._c10d_functional

Named = tuple[str, Tensor]


@dataclass(frozen=True)
class Slot:
    """Elements `[start, stop)` of parameter `name`, flattened, begin at `at` of what is updated, `owner`."""

    name: str
    start: int
    stop: int
    owner: nn.Parameter
    at: int

    def of(self, owned: Tensor) -> Tensor:
        """The slot's elements, flat, of the owner, its gradient, or one of its averages; a view if it can."""
        return owned.detach().reshape(-1)[self.at : self.at + self.stop - self.start]


class Whole:
    """Parameters that no other rank holds: they are updated as they are."""

    def __init__(self, names: Sequence[str], parameters: Sequence[nn.Parameter]) -> None:
        self.names, self.parameters = list(names), list(parameters)

    @property
    def updated(self) -> list[nn.Parameter]:
        """What the optimizer of this rank updates."""
        return self.parameters

    def start_reduction(self) -> None:
        """Nothing to send."""

    def end_reduction(self) -> None:
        """Nothing to receive."""

    def join(self) -> None:
        """Nothing to put together."""

    def slots(self) -> Iterator[Slot]:
        """Which elements of which parameters this rank updates: all of each."""
        for name, parameter in zip(self.names, self.parameters, strict=True):
            yield Slot(name, 0, parameter.numel(), parameter, 0)

    def in_whole(self, key: str, optimizer: torch.optim.Optimizer, names: Collection[str]) -> Iterator[Named]:
        """The optimizer's state `key` of those parameters that are among `names` and have one."""
        for name, parameter in zip(self.names, self.parameters, strict=True):
            if name in names and key in optimizer.state.get(parameter, {}):
                yield name, optimizer.state[parameter][key]


class Dealt:
    """Parameters that the `ranks` ranks of `axis` hold alike; the one at `place` updates its stretch.

    The parameters become views of one flat buffer, padded with zeros to a multiple of `ranks`, and `updated`
    is a stretch of it.
    """

    def __init__(
        self, names: Sequence[str], parameters: Sequence[nn.Parameter], axis: str, ranks: int, place: int
    ) -> None:
        self.names, self.parameters = list(names), list(parameters)
        self.axis, self.ranks = axis, ranks
        ends = list(itertools.accumulate(parameter.numel() for parameter in self.parameters))
        self._starts = [0, *ends[:-1]]
        self._length = max(1, -(-ends[-1] // ranks))
        self._low = place * self._length
        self._flat = self._lay_out()
        self._stretch = nn.Parameter(self._flat[self._low : self._low + self._length])
        self._arriving: Tensor | None = None

    def _lay_out(self) -> Tensor:
        flat = self.parameters[0].detach().new_zeros(self._length * self.ranks)
        for parameter, view in zip(self.parameters, self._views(flat), strict=True):
            view.copy_(parameter.detach())
            parameter.data = view
        return flat

    def _views(self, flat: Tensor) -> Iterator[Tensor]:
        """`flat` as tensors of the shapes of the parameters."""
        for start, parameter in zip(self._starts, self.parameters, strict=True):
            yield flat[start : start + parameter.numel()].view(parameter.shape)

    @property
    def updated(self) -> list[nn.Parameter]:
        """What the optimizer of this rank updates."""
        return [self._stretch]

    def start_reduction(self) -> None:
        """Send the gradients on their way to the ranks that update them, and free them."""
        flat = self._flat.new_zeros(self._flat.shape)
        for parameter, view in zip(self.parameters, self._views(flat), strict=True):
            if parameter.grad is not None:
                view.copy_(parameter.grad)
                parameter.grad = None
        self._arriving = _collectives.reduce_scatter_tensor(flat, "sum", self.ranks, self.axis)

    def end_reduction(self) -> None:
        """Wait for the sums; they are the gradient of the stretch."""
        self._stretch.grad = _collectives.wait_tensor(self._arriving)
        self._arriving = None

    @torch.no_grad()
    def join(self) -> None:
        """Give the updated stretch to the other ranks and take theirs; changes the parameters in place."""
        self._flat.copy_(self._gathered(self._stretch))
        PACKED.clear()  # torch does not count this as a write to the parameters

    def slots(self) -> Iterator[Slot]:
        """Which elements of which parameters this rank updates."""
        for name, start, parameter in zip(self.names, self._starts, self.parameters, strict=True):
            first = max(self._low, start)
            last = min(self._low + self._length, start + parameter.numel())
            if first < last:
                yield Slot(name, first - start, last - start, self._stretch, first - self._low)

    def in_whole(self, key: str, optimizer: torch.optim.Optimizer, names: Collection[str]) -> Iterator[Named]:
        """The optimizer's state `key` of the parameters among `names`; every rank of the axis must ask."""
        if key not in optimizer.state.get(self._stretch, {}):
            return
        value = optimizer.state[self._stretch][key]
        if value.dim() == 0:  # the count of steps
            yield from ((name, value) for name in self.names if name in names)
            return
        views = self._views(self._gathered(value))
        yield from ((name, view) for name, view in zip(self.names, views, strict=True) if name in names)

    def _gathered(self, stretch: Tensor) -> Tensor:
        sent = _collectives.all_gather_into_tensor(stretch.detach(), self.ranks, self.axis)
        gathered: Tensor = _collectives.wait_tensor(sent)
        return gathered


Held = Whole | Dealt
