"""The learning rate of each step: a straight climb, then half a cosine down to `min_lr`."""

from __future__ import annotations

import math

from moec.plan import Train


def learning_rate(step: int, settings: Train) -> float:
    """The rate of optimizer step `step`, counted from 0.

    Climbs to `lr` in `warmup` equal strides, the first of which is already taken at step 0 (a rate of zero
    would waste that step), and reaches `min_lr` at the last step. A pure function: resuming needs no
    scheduler state.
    """
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    strides = settings.steps - 1 - settings.warmup
    done = min(1.0, (step - settings.warmup) / strides) if strides > 0 else 1.0
    return settings.min_lr + (settings.lr - settings.min_lr) * (1.0 + math.cos(math.pi * done)) / 2.0
