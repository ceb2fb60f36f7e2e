"""Memory that operands are cut from in turn, so that they lie in the caches or do not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .clock import Stopwatch

NEAR, FAR = 4 << 20, 160 << 20
"""Bytes that are used in turn: those of the first stay in a cache, those of the second do not."""

Shapes = Sequence[tuple[int, ...]]
Run = Callable[..., object]


class Pool:
    """Gives operands out of `size` bytes of small random numbers, one after the other, and then anew."""

    def __init__(self, size: int) -> None:
        self._memory = torch.rand(size // 4) - 0.5
        self._next = 0

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """The next float32 tensor of this shape; one that is larger than all of the memory is made."""
        count = math.prod(shape)
        if count > self._memory.numel():
            return torch.rand(shape)
        if self._next + count > self._memory.numel():
            self._next = 0
        found = self._memory[self._next : self._next + count].view(shape)
        self._next += -(-count // 16) * 16
        return found

    def least(self, watch: Stopwatch, shapes: Shapes, run: Run, at_once: int = 0) -> float:
        """Seconds of one `run` on operands of these shapes, new ones each time.

        `at_once`: how many runs are timed together; 0: as many as take a millisecond or two.
        """
        if not at_once:
            once = self.least(watch, shapes, run, 1)
            at_once = max(1, min(64, int(0.0015 / max(once, 1e-7))))
            if at_once == 1:
                return once
        turn: list[tuple[Tensor, ...]] = []

        def prepare() -> None:
            turn[:] = [tuple(self.take(shape) for shape in shapes) for _ in range(at_once)]

        def together() -> None:
            for operands in turn:
                run(*operands)

        return watch.least(together, prepare) / at_once
