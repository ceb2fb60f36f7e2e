"""When a teacher falls silent: staged distillation (DeepSpeed-MoE, section 4.2.2).

A student with fewer layers may not be able to become what its teacher is; towards the end of the training the
teacher's term then keeps it from what it could be. So that term ends before the training does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moec.errors import PlanError
from moec.plan import Distill, Train


@dataclass(frozen=True)
class Ending:
    """A teacher spoke in the first `step` steps; `why` names the setting that ended it, and its value."""

    step: int
    why: str


def require_evaluations(distill: Distill, train: Train) -> None:
    """Raise `PlanError` for a patience that nothing could ever end: in a run without evaluations."""
    if distill.patience is not None and not 0 < train.eval_every < train.steps:
        found = f"patience = {distill.patience} with eval_every = {train.eval_every} in {train.steps} steps"
        needed = "evaluations during the run, whose losses it waits for"
        raise PlanError("distill.patience", found, needed, f"eval_every from 1 to {train.steps - 1}")


class Stages:
    """Tells for each step of a run of `steps` whether the teacher still speaks.

    It ends after the earliest of `stop · steps` (the nearest step; halves to the even one), `stop_step`, and
    `patience` evaluations in a row without a lower held-out loss than the lowest before. Evaluations are
    counted while the teacher speaks. Raises `PlanError` for a `stop_step` beyond the end of the run.
    """

    def __init__(self, distill: Distill, steps: int) -> None:
        at = distill.stop_step
        if at is not None and at > steps:
            found = f"stop_step = {at} in a run of {steps} steps"
            raise PlanError("distill.stop_step", found, f"at most {steps}", "stop = 1.0, for all steps")
        self._distill, self._steps = distill, steps
        self.last = round(distill.stop * steps)
        self._setting = "stop"
        if at is not None and at <= self.last:
            self.last, self._setting = at, "stop_step"
        self._lowest, self._waited = math.inf, 0

    def teaches(self, step: int) -> bool:
        """Whether the teacher speaks in the step after `step` steps were taken."""
        return step < self.last

    def ending(self, step: int) -> Ending | None:
        """How it came that the teacher is silent after `step` steps; None while it speaks, and where it
        speaks to the end of the run."""
        if self.teaches(step) or self.last >= self._steps:
            return None
        return Ending(self.last, f"{self._setting} = {getattr(self._distill, self._setting)}")

    def observe(self, step: int, loss: float) -> None:
        """Take note of the held-out loss after `step` steps."""
        patience = self._distill.patience
        if patience is None or not self.teaches(step):
            return
        self._waited = 0 if loss < self._lowest else self._waited + 1
        self._lowest = min(self._lowest, loss)
        if self._waited >= patience:
            self.last, self._setting = step, "patience"

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        lowest = None if math.isinf(self._lowest) else self._lowest
        return {"last": self.last, "setting": self._setting, "lowest": lowest, "waited": self._waited}

    def restore(self, record: Mapping[str, Any], step: int) -> None:
        """Go on from the record of an earlier run, kept after `step` steps, which may have had other `steps`.

        What happened stays: a teacher that was silent in a step, or was given up, does not speak again. One
        that still spoke does so until the setting says, by the steps of this run.
        """
        lowest = record["lowest"]
        self._lowest = math.inf if lowest is None else lowest
        self._waited = record["waited"]
        if record["last"] < step or record["setting"] == "patience":
            self.last, self._setting = record["last"], record["setting"]
        else:
            self.last = max(self.last, step)
