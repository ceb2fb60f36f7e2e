"""Seconds of every distinct task of a cost on given hardware: of the device, of links, of the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moec.cost.machine.hardware import Hardware
from moec.cost.machine.measured import Direction
from moec.cost.operation import Operation
from moec.cost.timing.arranged import Arranged
from moec.cost.timing.collectives import collective_seconds
from moec.cost.timing.numbers import Evaluator, Send, Task, numbered

WAIT = "_c10d_functional::wait_tensor"
INSIDE, BETWEEN = "inside", "between"

# What the device does for these is the sending itself, or waiting for it.
_SENT_ONLY = ("_c10d_functional::", "moec::exchange")

# Their kernels read on the host how many rows go where, which the device computes.
READS = frozenset({"moec::exchange", "moec::gather_rows", "moec::scatter_rows"})


@dataclass(frozen=True)
class OnLink:
    """Seconds along an axis; `stream`: the class of links that it goes over."""

    stream: str
    axis: str
    seconds: float


@dataclass(frozen=True)
class Time:
    """Seconds of one task: on the device, on links, of the host that starts it; whether the host needs what
    the device has computed to do so."""

    device: float
    links: tuple[OnLink, ...]
    host: float
    reads: bool = False


class Prices:
    """What tasks take. `times`: of every task of `evaluator`; `works`: their amounts in numbers;
    `unmeasured`: operators that a calibrated device does not know; `working`: bytes that one run touches in
    turn."""

    def __init__(
        self,
        evaluator: Evaluator,
        hardware: Hardware,
        mesh: Arranged,
        letters: Mapping[str, Any],
        *,
        training: bool,
        captured: bool,
    ) -> None:
        self.hardware, self._mesh, self._training = hardware, mesh, training
        self._host = 0.0 if captured else hardware.device.host
        self._amounts = evaluator({**letters, **mesh.numbers})
        self._tasks = evaluator.tasks
        self.works = [numbered(task, self._amounts) for task in evaluator.tasks]
        self.unmeasured: set[str] = set()
        self.working = self._touched(evaluator)
        self.times = [self._time(place, task) for place, task in enumerate(evaluator.tasks)]

    def at_peak(self, place: int) -> float:
        """Seconds of the arithmetic of a task at the peak of its dtype."""
        flops = float(self.works[place].flops)
        return flops / self.hardware.device.peak_of(self._tasks[place].dtype) if flops else 0.0

    def _time(self, place: int, task: Task) -> Time:
        links = [self._link(send) for send in task.sends]
        device = self._device(place, task)
        # An operator made of several kernels is several operators to the host; a view is one forward, and in
        # backward it is nearly nothing.
        starts = max(self.works[place].calls, 1.0 if task.direction == "forward" else 0.0)
        reads = self._host > 0 and task.operator in READS
        return Time(device, tuple(one for one in links if one.seconds), self._host * starts, reads)

    def _link(self, send: Send) -> OnLink:
        spread = self._mesh.spread(send.axis, self.hardware.per_node)
        messages, num_bytes = self._amounts[send.messages], self._amounts[send.bytes]
        seconds = collective_seconds(self.hardware, send.operator, spread, messages, num_bytes)
        return OnLink(BETWEEN if spread.crosses else INSIDE, send.axis, seconds)

    def _device(self, place: int, task: Task) -> float:
        work, device = self.works[place], self.hardware.device
        operation = Operation(
            "", "", None, task.operator, task.kind, task.dtype, weights=self._amounts[task.weights]
        )
        direction = self._direction(task)
        known = device.knows(operation, direction)
        if task.kind == "collective" and task.operator.startswith(_SENT_ONLY) and not known:
            return 0.0
        if work.calls and device.measured is not None and not known:
            self.unmeasured.add(task.operator)
        return device.seconds(work, operation, direction, self.working)

    def _direction(self, task: Task) -> Direction:
        if not self._training:
            return "inference"
        return "backward" if task.direction == "backward" else "forward"

    def _touched(self, evaluator: Evaluator) -> float:
        """Bytes that one run touches in turn: weights, and what every operation writes."""
        places = [*evaluator.forward, *(evaluator.backward if self._training else ())]
        weights = sum(self._amounts[evaluator.tasks[place].weights] for place in evaluator.forward)
        return float(weights + sum(self.works[place].written for place in places))
