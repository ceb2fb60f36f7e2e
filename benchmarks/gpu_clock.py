"""Time on a GPU, and how much of it is left: what the parts of `benchmarks.gpu` share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Reasons = dict[str, str]


class OutOfTimeError(Exception):
    """There is not enough of the budget left for what comes next."""


@dataclass
class Run:
    """One call of the script: where, in what dtype, and until when. `dry`: tiny sizes, to see that all of it
    runs."""

    device: torch.device
    dtype: torch.dtype
    budget: float
    dry: bool = False
    rounds: int = 20
    scattermoe: str = ""
    started: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget - (time.monotonic() - self.started)

    def demand(self, seconds: float, what: str) -> None:
        """Raise `OutOfTimeError` when fewer seconds are left."""
        if self.left() < seconds:
            raise OutOfTimeError(f"{what}: {max(self.left(), 0.0):.0f} s left of {self.budget:.0f}")

    def seconds(self, work: Callable[[], object], limit: float = 2.0) -> float:
        """The median time of `work`, warmed up, of as many rounds as fit into `limit` seconds (three at
        least)."""
        for _ in range(0 if self.dry else 3):
            work()
        self.wait()
        first = self._once(work)
        if self.dry:
            return first
        rounds = max(3, min(self.rounds, int(limit / max(first, 1e-6))))
        return statistics.median(self._once(work) for _ in range(rounds))

    def _once(self, work: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def wait(self) -> None:
        """Until all work is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def memory(self, work: Callable[[], object]) -> tuple[float, float]:
        """GB that `work` leaves allocated while its result lives, and the most it had at once, beyond
        before."""
        if self.device.type != "cuda":
            work()
            return 0.0, 0.0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = work()
        torch.cuda.synchronize()
        kept, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
        del result
        return kept / 1e9, peak / 1e9

    def bandwidth(self) -> dict[str, float]:
        """GB/s of reading, and of copying, more than any cache holds."""
        source = torch.empty((1 << 12) if self.dry else (1 << 30), dtype=torch.bfloat16, device=self.device)
        source.zero_()
        wide, target = source.view(torch.int32), torch.empty_like(source)
        read = self.seconds(lambda: torch.amax(wide))
        copy = self.seconds(lambda: target.copy_(source))
        return {"read": source.nbytes / read / 1e9, "copy": 2 * source.nbytes / copy / 1e9}

    def peak_flops(self) -> float:
        """TFLOP/s of the library's own product of large square matrices, in this run's dtype."""
        size = 32 if self.dry else 8192
        left, right = (torch.randn(size, size, device=self.device).to(self.dtype) for _ in range(2))
        return 2 * size**3 / self.seconds(lambda: left @ right) / 1e12


def attempt(name: str, work: Callable[[], Any], record: dict[str, Any]) -> None:
    """Put what `work` returns into `record` under `name`, or the reason why it could not."""
    try:
        record[name] = work()
    except Exception as error:  # a part that fails must not take the others with it, whatever it raised
        record[name] = {"failed": f"{type(error).__name__}: {str(error).strip()[:600]}"}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
