"""One optimizer step: gradients of a batch, clipping, the check that all is finite, the update.

Nothing here knows of files, schedules or screens. `OptimizerStep.take` is the whole of learning; its stages
are methods of their own, so that on several ranks a sum between `gradients` and `clip` is all there is to
add.
"""

from __future__ import annotations

import math

from torch import nn

from moec.errors import TrainError
from moec.plan import Train
from moec.runtime.balance import nudge_biases
from moec.runtime.batch_loss import BatchLoss, LossSum, compute_loss
from moec.runtime.data import Batch
from moec.runtime.groups import make_optimizer
from moec.runtime.trainable import Trainable, device_of


class OptimizerStep:
    """Takes optimizer steps on `program`, whose weights it changes in place; owns the optimizer."""

    def __init__(self, program: Trainable, settings: Train) -> None:
        self.program, self.settings = program, settings
        self.optimizer = make_optimizer(program, settings)
        self.device = device_of(program)

    def take(self, batch: Batch, rate: float) -> tuple[BatchLoss, float]:
        """Learn from `batch` (two i64 `[B, S]`) at learning rate `rate`; gives the loss and gradient norm.

        Raises `TrainError` when either is not finite; the weights are then as they were before.
        """
        try:
            loss = self.gradients(batch)
            norm = self.clip()
            self.update(rate, loss)
        finally:
            # Freed, not zeroed. Zeroing is a pass over every gradient, and the next backward then reads and
            # adds where it could have written: 35M parameters in 16 experts took 251 ms a step freed and
            # 262 ms zeroed, 68M in 32 experts 202 and 215 ms. What zeroing is good for, not asking the
            # system for fresh pages, the operators do for the large gradients (`ops/buffers.py`: without,
            # 285 ms in the second case).
            self.optimizer.zero_grad(set_to_none=True)
        return loss, norm

    def gradients(self, batch: Batch) -> BatchLoss:
        """Leave the mean gradient over `batch` in the parameters, computed in `accumulate` equal parts.

        The task loss is a mean over tokens, so its gradient does not depend on the number of parts. The
        balance term and expert capacities are those of each part: they are not linear in the batch.
        """
        total = LossSum()
        parts = self.settings.accumulate
        for tokens, targets in zip(*(side.to(self.device).chunk(parts) for side in batch), strict=True):
            terms = compute_loss(self.program, (tokens, targets), self.settings)
            (terms["loss"] / parts).backward()
            total.add(terms, tokens.numel())
        loss = total.mean()
        if not loss.is_finite:
            found = f"{loss.loss} (task {loss.task}, balance {loss.balance}, z {loss.z})"
            raise TrainError("loss", found, "a finite number", "a lower lr, or a longer warmup")
        return loss

    def clip(self) -> float:
        """Scale the gradients down to the norm `clip` where they exceed it; gives the norm before."""
        groups = self.optimizer.param_groups
        parameters = [p for group in groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        if not math.isfinite(norm):
            found = f"a gradient of norm {float(norm)}"
            raise TrainError(self._worst_gradient(), found, "a finite norm", "a lower lr")
        if self.settings.clip:
            nn.utils.clip_grads_with_norm_(parameters, self.settings.clip, norm)
        return float(norm)

    def update(self, rate: float, loss: BatchLoss) -> None:
        """Change the weights by the gradients, and the balancing biases by the load in `loss`."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        nudge_biases(self.program.moe_biases(), loss.counts, self.program.moe_settings())

    def _worst_gradient(self) -> str:
        """The parameter whose gradient is to blame for a norm that is not finite."""
        norms = {
            name: float(parameter.grad.norm())
            for name, parameter in self.program.named_parameters()
            if parameter.grad is not None
        }
        return max(norms, key=lambda name: math.inf if math.isnan(norms[name]) else norms[name])
