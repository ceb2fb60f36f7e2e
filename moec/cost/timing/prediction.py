"""`Prediction`: every operation of a program in time, and what can be read off that."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from moec.cost.cost import Cost
from moec.cost.machine.hardware import Hardware
from moec.cost.operation import Operation
from moec.cost.shown.table import Column, Table
from moec.cost.timing.schedule import DEVICE, longest
from moec.errors import CostError, nearest

BY = ("kind", "region", "layer", "operator", "axis", "direction", "stream")


@dataclass(frozen=True, slots=True)
class Step:
    """One operation in time, in seconds from the beginning.

    `direction`: forward or backward; `stream`: `device`, or the links that it goes over (`inside` a node,
    `between` nodes); `axis`: along which it sends, or empty. An operation that computes and sends is two
    steps. `cause`: the step that it waited for last, by its place in the timeline; None: for the host.
    """

    operation: Operation
    direction: str
    begin: float
    end: float
    stream: str = DEVICE
    axis: str = ""
    cause: int | None = None

    @property
    def seconds(self) -> float:
        """How long it takes."""
        return self.end - self.begin

    @property
    def kind(self) -> str:
        """Of its operation; what is on links is a collective."""
        return self.operation.kind if self.stream == DEVICE else "collective"


@dataclass(frozen=True)
class Prediction:
    """What `predict` says.

    `timeline`: all steps, as the host starts them; `flops`: of this rank; `bytes`: of its memory;
    `peak_seconds`: what those FLOPs would take at the peaks of their dtypes;
    `unmeasured`: operators that a calibrated device does not know, told by the roofline; `axes`: the ranks of
    every axis, those that follow from `letters` included.
    """

    timeline: tuple[Step, ...]
    hardware: Hardware
    phase: str = "forward"
    letters: dict[str, Any] = field(default_factory=dict)
    flops: float = 0.0
    bytes: float = 0.0
    unmeasured: tuple[str, ...] = ()
    cost: Cost | None = None
    axes: dict[str, int] = field(default_factory=dict)
    peak_seconds: float = 0.0

    @cached_property
    def memory(self) -> int:
        """Bytes of this rank, as `Cost.memory` tells them; `CostError` where nothing is known of weights."""
        if self.cost is None:
            raise CostError("Prediction.memory", "steps alone", "a prediction of a cost: predict(cost, …)")
        return self.cost.memory.numbers(**{**self.letters, **self.axes})["total"]

    @property
    def fits(self) -> bool:
        """Whether that is in the memory of a device."""
        return self.memory <= self.hardware.device.memory

    @cached_property
    def seconds(self) -> float:
        """From the beginning to the end of the last operation."""
        return max((step.end for step in self.timeline), default=0.0)

    def by(self, what: str) -> dict[str, float]:
        """Seconds by one of `BY`; those that overlap count in full. `axis`: of what is sent alone."""
        if what not in BY:
            raise CostError("Prediction.by", f"{what!r}", f"one of {', '.join(BY)}", nearest(what, BY))
        found: dict[str, float] = defaultdict(float)
        for step in self.timeline:
            if what != "axis" or step.axis:
                own = what in ("kind", "axis", "direction", "stream")
                found[str(getattr(step if own else step.operation, what))] += step.seconds
        return dict(found)

    @cached_property
    def critical(self) -> tuple[Step, ...]:
        """The steps that waited for each other, up to the last: to be faster, one of these has to be."""
        return tuple(self.timeline[index] for index in longest(self.timeline))

    @cached_property
    def communication(self) -> float:
        """Seconds in which anything is on a link."""
        return sum(end - begin for begin, end in _united(self._on_links()))

    @cached_property
    def exposed(self) -> float:
        """Seconds in which something is on a link and the device does nothing."""
        busy = _united((step.begin, step.end) for step in self.timeline if step.stream == DEVICE)
        return self.communication - _common(_united(self._on_links()), busy)

    @cached_property
    def idle(self) -> float:
        """Seconds in which neither the device nor a link does anything: they wait for the host."""
        return self.seconds - sum(e - b for b, e in _united((step.begin, step.end) for step in self.timeline))

    @property
    def flops_share(self) -> float:
        """FLOPs a second, as a share of the peaks of the dtypes that they are computed in."""
        return self.peak_seconds / self.seconds if self.seconds else 0.0

    @property
    def bandwidth_share(self) -> float:
        """Bytes a second, as a share of the bandwidth of memory."""
        return self.bytes / self.seconds / self.hardware.device.bandwidth if self.seconds else 0.0

    def _on_links(self) -> Iterable[tuple[float, float]]:
        return ((step.begin, step.end) for step in self.timeline if step.stream != DEVICE)

    def table(self, by: str = "kind") -> Table:
        """Seconds by one of `BY`, the longest first, and their share of the whole."""
        rows = sorted(self.by(by).items(), key=lambda row: -row[1])
        shown = [(name, time, f"{time / self.seconds:.1%}") for name, time in rows if time]
        columns = (Column(by), Column("time", "s"), Column("share"))
        return Table(columns, tuple(shown), total=("together", self.seconds, ""), notes=self._notes())

    def _notes(self) -> tuple[str, ...]:
        notes = [f"{self.flops_share:.1%} of the peak, {self.bandwidth_share:.1%} of the bandwidth of memory"]
        if self.communication:
            notes.append(f"{self.exposed / self.seconds:.1%} of the time only links are at work")
        if self.idle > 0.001 * self.seconds:
            notes.append(f"{self.idle / self.seconds:.1%} of the time all wait for the host")
        if self.cost is not None and self.cost.weights is not None and not self.fits:
            device = self.hardware.device.memory
            notes.append(f"does not fit: {self.memory / 1e9:.3g} GB a rank, {device / 1e9:.3g} GB a device")
        if self.unmeasured:
            notes.append(f"not measured, told by the roofline: {', '.join(self.unmeasured)}")
        return tuple(notes)

    def __str__(self) -> str:
        letters = ", ".join(f"{name} = {number}" for name, number in self.letters.items())
        return f"{self.phase} on {self.hardware.device.name}, {letters}\n\n{self.table()}"

    def trace(self) -> dict[str, Any]:
        """The timeline as Chrome's trace format has it (chrome://tracing, ui.perfetto.dev)."""
        events = [
            {
                "name": step.operation.name,
                "cat": step.kind,
                "ph": "X",
                "ts": step.begin * 1e6,
                "dur": step.seconds * 1e6,
                "pid": "rank 0",
                "tid": step.stream,
                "args": {"operator": step.operation.operator, "direction": step.direction, "axis": step.axis},
            }
            for step in self.timeline
            if step.seconds
        ]
        return {"traceEvents": events, "displayTimeUnit": "ms"}

    def save_trace(self, path: str | Path) -> None:
        """Write `trace()` as JSON."""
        Path(path).write_text(json.dumps(self.trace()), encoding="utf-8")


def _united(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same moments in spans that do not touch, in order."""
    found: list[tuple[float, float]] = []
    for begin, end in sorted(span for span in spans if span[1] > span[0]):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found


def _common(left: Sequence[tuple[float, float]], right: Sequence[tuple[float, float]]) -> float:
    """Seconds that both have; each is in order and does not touch itself."""
    found, i, j = 0.0, 0, 0
    while i < len(left) and j < len(right):
        found += max(0.0, min(left[i][1], right[j][1]) - max(left[i][0], right[j][0]))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return found
