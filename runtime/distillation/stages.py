"""When a teacher falls silent: staged distillation (DeepSpeed-MoE, section 4.2.2).

A student with fewer layers may not be able to become what its teacher is; towards the end of the training the
teacher's term then keeps it from what it could be. So that term ends before the training does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moec.plan import Distill


class Stages:
    """Tells for each step of a run of `steps` whether the teacher still speaks.

    It ends after the earliest of `stop · steps` (rounded to the nearest step), `stop_step` and `patience`
    evaluations in a row without a lower held-out loss than before. What it goes by is in `record`.
    """

    def __init__(self, distill: Distill, steps: int) -> None:
        self._patience = distill.patience
        planned = round(distill.stop * steps)
        self.last = planned if distill.stop_step is None else min(planned, distill.stop_step)
        self._lowest, self._waited = math.inf, 0

    def teaches(self, step: int) -> bool:
        """Whether the teacher speaks in the step after `step` steps were taken."""
        return step < self.last

    def observe(self, step: int, loss: float) -> None:
        """Take note of the held-out loss after `step` steps."""
        if self._patience is None or not self.teaches(step):
            return
        self._waited = 0 if loss < self._lowest else self._waited + 1
        self._lowest = min(self._lowest, loss)
        if self._waited >= self._patience:
            self.last = step

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        lowest = None if math.isinf(self._lowest) else self._lowest
        return {"last": self.last, "lowest": lowest, "waited": self._waited}

    def restore(self, record: Mapping[str, Any]) -> None:
        """Go on from a record of an earlier run."""
        lowest = record["lowest"]
        self.last, self._waited = record["last"], record["waited"]
        self._lowest = math.inf if lowest is None else lowest
