"""Threads that take turns: one runs at a time, and hands on when it has to wait for another.

Ranks that are simulated in one process run this way, which makes three things exact that are luck with free
threads. *Order*: the same one every time. *Random numbers*: torch's generator belongs to the process, so each
thread gets its own state of it with every turn, and draws what a process of its own would have drawn.
*Deadlock*: when nobody can go on, that is seen at once and not after a time limit.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch

from moec.errors import MeshError

_GRACE = 0.2  # seconds that a thread is given to unwind when one of them does not come back at all


class Released(BaseException):
    """Raised in a waiting thread when the others have failed: it unwinds, and is not reported."""


class Turns:
    """Runs `count` functions in threads that take turns; `pause` and `wake` are called by these threads."""

    def __init__(self, count: int) -> None:
        self._results: list[Any] = [None] * count
        self._ready = deque(range(count))
        self._waiting: dict[int, Callable[[], str]] = {}
        self._ended: set[int] = set()
        self._bells = [threading.Semaphore(0) for _ in range(count)]
        self._finished = threading.Event()
        self._running = -1
        self._over = False
        self._failure: BaseException | None = None
        self._random = [torch.get_rng_state()] * count  # each as a process that was seeded like the caller

    def run(self, function: Callable[[int], Any], timeout: float) -> list[Any]:
        """`function(i)` of every thread i, in order; the first failure of any is raised here.

        `MeshError` when nobody can go on, or when they have not ended in `timeout` seconds.
        """
        before = torch.get_rng_state()
        threads = [
            threading.Thread(target=self._body, args=(function, index), name=f"rank {index}", daemon=True)
            for index in range(len(self._bells))
        ]
        for thread in threads:
            thread.start()
        try:
            self._hand_on()
            if not self._finished.wait(timeout):
                self._fail(self._too_long(timeout))
        except BaseException as error:  # an interrupt
            self._fail(error)
        for thread in threads:
            thread.join(None if self._finished.is_set() else _GRACE)
        self._over = True
        torch.set_rng_state(before)
        if self._failure is not None:
            raise self._failure
        return self._results

    def pause(self, index: int, why: Callable[[], str]) -> None:
        """Wait, in thread `index`, until another calls `wake(index)`; `why()` is told when nobody ever
        does."""
        self._waiting[index] = why
        self._random[index] = torch.get_rng_state()
        self._hand_on()
        self._take_turn(index)

    def wake(self, index: int) -> None:
        """Let the paused thread `index` have its turn again; an awake one stays so."""
        if self._waiting.pop(index, None) is not None:
            self._ready.append(index)

    @property
    def over(self) -> bool:
        """Whether `run` has returned, so that a thread that asks was left behind."""
        return self._over

    def _body(self, function: Callable[[int], Any], index: int) -> None:
        try:
            self._take_turn(index)
            self._results[index] = function(index)
        except Released:
            pass
        except BaseException as error:
            self._fail(_named(error, index))
        finally:
            self._ended.add(index)
            if self._failure is None:
                self._hand_on()
            elif len(self._ended) == len(self._bells):
                self._finished.set()

    def _take_turn(self, index: int) -> None:
        if self._failure is None:
            self._bells[index].acquire()
        if self._failure is not None:
            raise Released
        torch.set_rng_state(self._random[index])

    def _hand_on(self) -> None:
        """Ring for the next thread that can go on; the end when all have ended, an error when none can."""
        if self._ready:
            self._running = self._ready.popleft()
            self._bells[self._running].release()
        elif self._waiting:
            self._fail(self._stuck())
        else:
            self._finished.set()

    def _fail(self, error: BaseException) -> None:
        """Keep the first failure and let every thread go, to unwind."""
        if self._failure is None:
            self._failure = error
            for bell in self._bells:
                bell.release()

    def _stuck(self) -> MeshError:
        first = min(self._waiting)
        reasons = [f"rank {index} waits for {self._waiting[index]()}" for index in sorted(self._waiting)[:4]]
        ended = [f"{ranks_named(self._ended)} ended"] if self._ended else []
        needed = "the same collectives in the same order on every rank"
        return MeshError(f"rank {first}", "; ".join([*reasons, *ended]), needed)

    def _too_long(self, timeout: float) -> MeshError:
        found = f"still running after {timeout:g} s"
        return MeshError(f"rank {self._running}", found, "an end within the time limit", "a longer timeout")


def ranks_named(ranks: Iterable[int]) -> str:
    """`rank 3`, `ranks 0, 2, 5`, the first few of many."""
    ranks = set(ranks)
    shown = ", ".join(map(str, sorted(ranks)[:6])) + (", …" if len(ranks) > 6 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"


def _named(error: BaseException, index: int) -> BaseException:
    error.add_note(f"in rank {index}")
    return error
