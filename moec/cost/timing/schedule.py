"""When everything happens: a device that computes in order, links that carry, a host that starts both.

Three kinds of streams. The device runs what it is given one after the other. Each class of links (`inside` a
node, `between` nodes) carries one collective after the other, while the device goes on with what does not
need it. The host starts everything in order, and nothing begins before it was started; where it is the slower
one, the device waits. A collective begins when all that the device had to do before it in the program is
done, as streams of a GPU are synchronised; what waits for it (`wait_tensor`) holds the device up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

DEVICE = "device"


@dataclass(frozen=True, slots=True)
class Job:
    """One thing to do. `stream`: `device`, or a class of links; `seconds` there; `host`: seconds to start it.

    `needs`: jobs that must be over, by index, all before this one. `holds`: the device waits until it is over
    (a collective that its own kernel awaits). `reads`: to start it the host needs numbers that the
    device computes (how many rows go where), so it first waits until the device has done all it was given.
    """

    stream: str
    seconds: float
    host: float = 0.0
    needs: tuple[int, ...] = ()
    holds: bool = False
    reads: bool = False


@dataclass(frozen=True, slots=True)
class Slot:
    """When a job runs, in seconds, and the job that it waited for last, or that the host had waited for to
    start it; None: it waited for the host alone."""

    begin: float
    end: float
    cause: int | None


def schedule(jobs: Sequence[Job]) -> list[Slot]:
    """When each of `jobs`, which are in the order in which the host starts them, begins and ends."""
    slots: list[Slot] = []
    free: dict[str, tuple[float, int | None]] = {DEVICE: (0.0, None)}
    started: float = 0.0
    told: int | None = None
    for index, job in enumerate(jobs):
        if job.reads and free[DEVICE][0] > started:
            started, told = free[DEVICE]
        started += job.host
        begin, cause = started, told
        for moment, other in (free[DEVICE], free.get(job.stream, (0.0, None))):
            if moment > begin or (moment == begin and other is not None):
                begin, cause = moment, other
        for need in job.needs:
            if slots[need].end > begin:
                begin, cause = slots[need].end, need
        end = begin + job.seconds
        slots.append(Slot(begin, end, cause))
        free[job.stream] = (end, index)
        if job.holds:
            free[DEVICE] = (end, index)
    return slots


class Timed(Protocol):
    """What has an end, and a cause among others like it."""

    @property
    def end(self) -> float:
        """In seconds."""
        ...

    @property
    def cause(self) -> int | None:
        """What it waited for last, by index."""
        ...


def longest(slots: Sequence[Timed]) -> list[int]:
    """The jobs, by index, that one waited for after the other, up to the last one that ends.

    Where a job waited for the host alone, the way begins with it.
    """
    if not slots:
        return []
    at: int | None = max(range(len(slots)), key=lambda index: slots[index].end)
    found = []
    while at is not None:
        found.append(at)
        at = slots[at].cause
    return found[::-1]
