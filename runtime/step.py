"""One optimizer step: gradients of a batch, clipping, the check that all is finite, the update.

Nothing here knows of files, schedules or screens. `OptimizerStep.take` is the whole of learning; its stages
are methods of their own. On several ranks each stage is the same on all of them, errors included: what they
decide by are sums over the job.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

from moec.errors import TrainError
from moec.plan import Train
from moec.runtime.balance import nudge_biases
from moec.runtime.batch_loss import BatchLoss, LossSum, compute_loss
from moec.runtime.data import IGNORED, Batch
from moec.runtime.distillation.lesson import Lesson
from moec.runtime.holding import Holding
from moec.runtime.observed import Observer
from moec.runtime.optimizer import Optimizer
from moec.runtime.ranks import ranks_of
from moec.runtime.recompute import recomputing
from moec.runtime.trainable import Trainable

Lessons = Callable[[Batch, int], Lesson]


class OptimizerStep:
    """Takes optimizer steps on `program`, whose weights it changes in place; owns the optimizer."""

    def __init__(self, program: Trainable, settings: Train) -> None:
        self.program, self.settings = program, settings
        self.ranks = ranks_of(program)
        self.holding = Holding(program, self.ranks)
        self.optimizer = Optimizer(program, settings, self.holding)

    def take(
        self, batch: Batch, rate: float, lessons: Lessons | None = None, observer: Observer | None = None
    ) -> tuple[BatchLoss, float]:
        """Learn from `batch` (two i64 `[B, S]`) at learning rate `rate`; gives the loss and gradient norm.

        The batch is that of the whole job, the same on every rank; each learns from its stretch of it.
        `lessons`: asks a teacher about a part of the batch that begins with its i-th sequence. `observer`:
        hears what routers say, of every part.
        Raises `TrainError` when either is not finite; the weights are then as they were before.
        """
        try:
            loss = self.gradients(batch, lessons, observer)
            self.optimizer.reduce()
            norm = self.clip()
            self.update(rate, loss)
        finally:
            self.optimizer.free()
        return loss, norm

    def gradients(
        self, batch: Batch, lessons: Lessons | None = None, observer: Observer | None = None
    ) -> BatchLoss:
        """Leave the mean gradient over `batch` in the parameters, computed in `accumulate` equal parts.

        The task loss is a mean over tokens, so its gradient does not depend on the number of parts. The
        balance term and expert capacities are those of each part: they are not linear in the batch. On
        several ranks the gradients are shares, to be summed by `Optimizer.reduce`.
        """
        total, first = LossSum(), 0
        parts = self.settings.accumulate
        with recomputing(self.program, self.settings.recompute):
            for part in zip(*(side.chunk(parts) for side in batch), strict=True):
                self._learn(part, None if lessons is None else lessons(part, first), total, observer)
                first += len(part[0])
        loss = total.mean(self.ranks)
        if not loss.is_finite:
            require_targets(batch, parts)
            told = ", ".join(f"{name} {term}" for name, term in loss.terms.items() if name != "loss")
            found = f"{loss.loss} ({told})"
            raise TrainError("loss", found, "a finite number", "a lower lr, or a longer warmup")
        return loss

    def _learn(self, part: Batch, lesson: Lesson | None, total: LossSum, observer: Observer | None) -> None:
        """Add the gradient of one part; what it took, the lesson among it, goes before the next part."""
        tokens, targets = (side.to(self.ranks.device) for side in self.ranks.stretch(part))
        with nullcontext() if observer is None else observer.part():
            terms = compute_loss(self.program, (tokens, targets), self.settings, lesson)
        (terms["loss"] / self.settings.accumulate).backward()
        total.add(terms, part[0].numel())

    def clip(self) -> float:
        """Scale the gradients down to the norm `clip` where they exceed it; gives the norm before."""
        norm = self.optimizer.norm()
        if not math.isfinite(norm):
            found = f"a gradient of norm {float(norm)}"
            raise TrainError(self.optimizer.worst_gradient(), found, "a finite norm", "a lower lr")
        if self.settings.clip:
            self.optimizer.scale(self.settings.clip, norm)
        return float(norm)

    def update(self, rate: float, loss: BatchLoss) -> None:
        """Change the weights by the gradients, and the balancing biases by the load in `loss`."""
        self.optimizer.step(rate)
        nudge_biases(self.program.moe_biases(), loss.counts, self.program.moe_settings())


def require_targets(batch: Batch, parts: int) -> None:
    """Raise `TrainError` where nothing in one of the `parts` that `batch` is computed in is to be learned:
    the mean over no positions is no number."""
    for number, targets in enumerate(batch[1].chunk(parts), start=1):
        if not (targets != IGNORED).any():
            whole = parts == 1 or not (batch[1] != IGNORED).any()
            where = "batch" if whole else f"batch, part {number} of {parts}"
            found = f"no position that counts: every target is {IGNORED}"
            nearest = "targets that are not all masked" if whole else "accumulate = 1"
            raise TrainError(where, found, "one position at least that counts", nearest)
