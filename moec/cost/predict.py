"""How long a program will take on given hardware: numbers for the letters, then the longest way through.

prediction = predict(program.cost("forward"), Hardware.shipped("a100x256"), B=8, S=1024)
prediction.seconds, prediction.by("kind")
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy

from .cost import Cost
from .hardware import Hardware
from .operation import Operation, Sending
from .symbols import symbol


@dataclass(frozen=True)
class Step:
    """One operation in time, in seconds from the beginning; `direction`: forward or backward."""

    operation: Operation
    direction: str
    begin: float
    end: float


@dataclass(frozen=True)
class Prediction:
    """What `predict` says: every operation in time."""

    timeline: tuple[Step, ...]

    @property
    def seconds(self) -> float:
        """From the beginning to the end of the last operation."""
        return max((step.end for step in self.timeline), default=0.0)

    def by(self, what: str) -> dict[str, float]:
        """Seconds by `kind`, `region`, `layer` or `operator`; those that overlap count in full."""
        found: dict[str, float] = defaultdict(float)
        for step in self.timeline:
            found[str(getattr(step.operation, what))] += step.end - step.begin
        return dict(found)


def predict(cost: Cost, hardware: Hardware, **letters: int) -> Prediction:
    """The time of one run of `cost` on `hardware`, for batch, sequence and axes as in `letters`."""
    numbers = Numbers(cost, letters)
    now, timeline = 0.0, []
    for direction in ("forward", "backward"):
        for one in cost.operations if direction == "forward" else reversed(cost.operations):
            end = now + _seconds(one, direction, hardware, numbers)
            timeline.append(Step(one, direction, now, end))
            now = end
    return Prediction(tuple(timeline))


class Numbers:
    """Numbers for expressions; each distinct expression is computed once."""

    def __init__(self, cost: Cost, letters: dict[str, int]) -> None:
        self.given = {**cost.axes, **{symbol(name): number for name, number in letters.items()}}
        self._known: dict[Any, float] = {}

    def __call__(self, amount: Any) -> float:
        if amount not in self._known:
            self._known[amount] = float(sympy.sympify(amount).subs(self.given))
        return self._known[amount]


def _seconds(one: Operation, direction: str, hardware: Hardware, numbers: Numbers) -> float:
    work = one.forward if direction == "forward" else one.backward
    device, calls = hardware.device, numbers(work.calls)
    if not calls:
        return _sent(one.sends if direction == "forward" else one.sends_back, hardware, numbers)
    computed = numbers(work.flops) / device.peak.get(one.dtype, min(device.peak.values()))
    moved = numbers(work.bytes) / device.bandwidth
    sent = _sent(one.sends if direction == "forward" else one.sends_back, hardware, numbers)
    return device.launch * calls + max(computed, moved) + sent


def _sent(sends: Sequence[Sending], hardware: Hardware, numbers: Numbers) -> float:
    link = hardware.between or hardware.inside
    return sum(numbers(s.messages) * link.latency + numbers(s.bytes) / link.bandwidth for s in sends)
