"""How long a program will take on given hardware: numbers for the letters, then the longest way through.

prediction = predict(program.cost("forward"), Hardware.shipped("a100x64"), B=8, S=1024)
print(prediction);  prediction.seconds, prediction.by("kind"), prediction.exposed

Every operation is priced by `Device.seconds`, every collective by its groups (`collectives.py`); then they
run as `schedule.py` says. Collectives that the graph starts and awaits apart overlap with what stands in
between; those that a kernel or a gradient awaits itself do not. A collective is not slowed down by what the
device computes meanwhile, nor the other way round.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from moec.cost.cost import Cost
from moec.cost.letters import checked
from moec.cost.machine.hardware import Hardware
from moec.cost.operation import Operation
from moec.cost.timing.arranged import arranged
from moec.cost.timing.prediction import Prediction, Step
from moec.cost.timing.pricing import WAIT, Prices, Time
from moec.cost.timing.schedule import DEVICE, Job, schedule

__all__ = ["Prediction", "Step", "predict"]


def predict(cost: Cost, hardware: Hardware, *, captured: bool = False, **letters: int) -> Prediction:
    """The time of one run of `cost` on `hardware`, for batch, sequence and axes as in `letters`.

    `captured`: the program was recorded once and is started as a whole (a CUDA graph), so that the host
    starts no operator by itself; of a program whose exchanges have sizes that are data, which a host reads,
    it is what is left to gain. Axes that are not given are as `cost` was read, or follow from those that
    are. Raises `CostError` for a letter without a number or one that is none, `MeshError` for a mesh that
    does not fit together, on which the program would be another one, or that has more ranks than `hardware`
    devices, `PlanError` for a dtype that the device has no peak for.
    """
    mesh = arranged(cost.mesh, checked(letters, cost.mesh.axes()))
    hardware.require_world(mesh.mesh.world)
    cost.given(letters)  # raises for ranks on which the program would be another one
    training = cost.phase == "training"
    prices = Prices(cost.evaluator, hardware, mesh, letters, training=training, captured=captured)
    plan = _Plan(cost, prices.times)
    return Prediction(
        tuple(plan.steps()),
        hardware,
        cost.phase,
        dict(letters),
        float(sum(count * prices.works[place].flops for place, count in plan.tasks.items())),
        float(sum(count * prices.works[place].bytes for place, count in plan.tasks.items())),
        tuple(sorted(prices.unmeasured)),
        cost,
        mesh.numbers,
        sum(count * prices.at_peak(place) for place, count in plan.tasks.items()),
    )


class _Plan:
    """The jobs of all operations in the order in which they are started; `tasks`: how often each one runs."""

    def __init__(self, cost: Cost, times: list[Time]) -> None:
        self.operations = cost.operations
        self.jobs: list[Job] = []
        self.tasks: Counter[int] = Counter()
        self._about: list[tuple[Operation, str, str]] = []
        self._sent: dict[int, int] = {}
        self._awaited = {start for one in self.operations if one.operator == WAIT for start in _started(one)}
        for index, direction, place in _order(cost):
            self.tasks[place] += 1
            self._add(index, direction, times[place])

    def steps(self) -> Iterator[Step]:
        """Every job in time."""
        for (one, direction, axis), job, slot in zip(
            self._about, self.jobs, schedule(self.jobs), strict=True
        ):
            yield Step(one, direction, slot.begin, slot.end, job.stream, axis, slot.cause)

    def _add(self, index: int, direction: str, time: Time) -> None:
        one, forward = self.operations[index], direction == "forward"
        if not forward and not (time.device or time.links or time.host):
            return
        host, reads = time.host, time.reads
        if time.device or not time.links:
            needs = self._needs(one) if forward else ()
            self._job(one, direction, Job(DEVICE, time.device, host, needs, reads=reads))
            host, reads = 0.0, False
        for link in time.links:
            holds = not forward or index not in self._awaited
            self._job(
                one, direction, Job(link.stream, link.seconds, host, holds=holds, reads=reads), link.axis
            )
            host, reads = 0.0, False
            if forward:
                self._sent[index] = len(self.jobs) - 1

    def _needs(self, one: Operation) -> tuple[int, ...]:
        """The collectives, as jobs, whose results it reads; the device has done all else anyhow."""
        return tuple(self._sent[index] for index in one.after if index in self._sent)

    def _job(self, one: Operation, direction: str, job: Job, axis: str = "") -> None:
        self.jobs.append(job)
        self._about.append((one, direction, axis))


def _started(wait: Operation) -> tuple[int, ...]:
    """The collectives whose end this is."""
    return wait.after if wait.started is None else (wait.started,)


def _order(cost: Cost) -> Iterator[tuple[int, str, int]]:
    """(operation, direction, task): forward and the same backwards, for every part of a step; the optimizer
    last."""
    last = [index for index, one in enumerate(cost.operations) if one.kind == "optimizer"]
    graph = sorted(set(range(len(cost.operations))) - set(last))
    forward, backward = cost.evaluator.forward, cost.evaluator.backward
    training = cost.phase == "training"
    for _ in range(cost.step.accumulate if training else 1):
        yield from ((index, "forward", forward[index]) for index in graph)
        if training:
            yield from ((index, "backward", backward[index]) for index in reversed(graph))
    yield from ((index, "forward", forward[index]) for index in last)
