"""How well a program predicts held-out text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moec.plan import Train
from moec.runtime.balance import Load, loads_of
from moec.runtime.batch_loss import LossSum, compute_loss
from moec.runtime.data import TextData
from moec.runtime.ranks import ranks_of
from moec.runtime.rng import borrowed_rng
from moec.runtime.trainable import Trainable, in_mode


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy over `num_tokens` held-out tokens, in nats, and what each expert layer did.

    `load` sums up how even it was; `counts` are the rows that each expert of the layer computed.
    """

    loss: float
    num_tokens: int
    load: Mapping[str, Load]
    counts: Mapping[str, tuple[int, ...]]

    @property
    def perplexity(self) -> float:
        """The number of equally likely tokens that would be as hard to predict."""
        return math.exp(min(self.loss, 700.0))  # beyond, a float overflows

    @property
    def bits(self) -> float:
        """Bits per token."""
        return self.loss / math.log(2.0)


def evaluate(
    program: Trainable, data: TextData, settings: Train | None = None, *, batches: int | None = None
) -> Evaluation:
    """Evaluate on `batches` batches spread over the held-out text, or on all of it.

    Dropout and routing noise are off, the mode of `program` and torch's random state are as before
    afterwards. `settings` says the batch size and the arithmetic. Every rank of a job must evaluate, and gets
    the same.
    """
    settings = settings or Train()
    ranks = ranks_of(program)
    total = LossSum()
    with torch.no_grad(), in_mode(program, training=False), borrowed_rng(ranks.device):
        for batch in data.held_out_batches(settings.batch // settings.accumulate, batches):
            tokens, targets = (side.to(ranks.device) for side in ranks.stretch(batch))
            total.add(compute_loss(program, (tokens, targets), settings), batch[0].numel())
    loss = total.mean(ranks)
    load = loads_of(loss.counts, program.moe_settings(), total.num_tokens)
    counts = {layer: tuple(row.tolist()) for layer, row in loss.counts.items()}
    return Evaluation(loss.task, total.num_tokens, load, counts)
