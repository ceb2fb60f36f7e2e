"""Timing in one process: contenders take turns, round after round, so that a slow minute hits all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds of each round of one contender, and what of them the processor was busy in this process.

    The second is what remains comparable when others use the machine; it is summed over threads.
    """

    name: str
    seconds: tuple[float, ...]
    busy: tuple[float, ...] = ()

    @property
    def best(self) -> float:
        """The fastest round: what the code can do when the machine lets it."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """The middle round: what to expect."""
        return statistics.median(self.seconds)


def race(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: int = 2,
    before: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Run every contender `warm_up` times unmeasured, then `rounds` times each, taking turns.

    `before` is called ahead of every measured round, outside of its time.
    """
    for run in contenders.values():
        for _ in range(warm_up):
            run()
    rounds_of: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for round_ in range(rounds):
        for name in list(contenders)[:: 1 if round_ % 2 == 0 else -1]:
            before()
            rounds_of[name].append(_seconds(contenders[name]))
    return {name: Timing(name, *zip(*times, strict=True)) for name, times in rounds_of.items()}


def _seconds(run: Callable[[], object]) -> tuple[float, float]:
    busy, start = time.process_time(), time.perf_counter()
    run()
    return time.perf_counter() - start, time.process_time() - busy
