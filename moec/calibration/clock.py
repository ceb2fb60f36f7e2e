"""How long something takes when nothing disturbs it: the least of several runs.

With one thread it is processor time that is counted, as a machine that others use takes the processor away
and gives it back. The clock on the wall is read too, so that a calibration can tell how busy the machine was.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Stopwatch:
    """Measures with `threads` threads; `wall` and `busy` add up what all measurements took.

    `own`: only what this thread does counts, not what it waits for (a message that another one sends).
    """

    threads: int = 1
    patience: float = 0.005
    rounds: int = 4
    own: bool = False
    wall: float = 0.0
    busy: float = 0.0

    @property
    def now(self) -> Callable[[], float]:
        """The clock that times are told by."""
        if self.own:
            return time.thread_time
        return time.process_time if self.threads == 1 else time.perf_counter

    @property
    def wall_over_busy(self) -> float:
        """1 on a machine that nobody else uses, for one thread."""
        return self.wall / (self.busy or 1.0) if self.wall else 1.0

    def least(self, run: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
        """Seconds of the shortest of some runs: `rounds` at least, for `patience` seconds at least.

        `before` is called ahead of every run, outside of its time.
        """
        before()
        run()
        found, rounds, begin, busy = float("inf"), 0, time.perf_counter(), time.process_time()
        while rounds < self.rounds or time.perf_counter() - begin < self.patience:
            before()
            start = self.now()
            run()
            found, rounds = min(found, self.now() - start), rounds + 1
        self.wall += time.perf_counter() - begin
        self.busy += time.process_time() - busy
        return found
