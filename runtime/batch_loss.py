"""The loss of a batch as numbers: in the arithmetic of the settings, summed over parts of a batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from moec.plan import Train
from moec.runtime.data import Batch
from moec.runtime.distillation.lesson import Lesson
from moec.runtime.ranks import ALONE, Ranks
from moec.runtime.trainable import LossTerms, Trainable

TERMS: tuple[Literal["loss", "task", "balance", "z", "kl", "hidden"], ...] = (
    "loss", "task", "balance", "z", "kl", "hidden",
)  # fmt: skip


@dataclass(frozen=True)
class BatchLoss:
    """The mean loss over some tokens, taken apart; `counts` sum the rows of each expert, i64 `[E]`.

    `kl` and `hidden` (not weighted) are those of a teacher; None where none speaks.
    """

    loss: float
    task: float
    balance: float
    z: float
    counts: Mapping[str, Tensor]
    kl: float | None = None
    hidden: float | None = None

    @property
    def terms(self) -> dict[str, float]:
        """The loss and its terms by name, those that there are."""
        named = {name: getattr(self, name) for name in TERMS}
        return {name: term for name, term in named.items() if term is not None}

    @property
    def is_finite(self) -> bool:
        """Whether every term is a finite number."""
        return all(map(math.isfinite, self.terms.values()))


def compute_loss(
    program: Trainable, batch: Batch, settings: Train, lesson: Lesson | None = None
) -> LossTerms:
    """The loss terms of one batch, in bf16 where the settings say so; `lesson`: what a teacher says of it.

    bf16 is autocast: weights stay fp32, matrix products run in bf16, and softmax, norms and losses in fp32.
    """
    tokens, targets = batch
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=settings.dtype == "bf16"):
        if lesson is None:  # what never meets a teacher need not know of lessons
            return program.loss_terms(tokens, targets)
        return program.loss_terms(tokens, targets, lesson=lesson)


@dataclass
class LossSum:
    """Adds up `LossTerms`, without their graphs, until `mean` is asked for."""

    _terms: dict[str, Tensor] = field(default_factory=dict)
    _counts: dict[str, Tensor] = field(default_factory=dict)
    _weight: int = 0

    def add(self, terms: LossTerms, weight: int) -> None:
        """Count `terms` in, as means (or this rank's shares of them) over `weight` tokens of the job."""
        self._weight += weight
        for name in TERMS:
            if name in terms:
                term: Tensor = terms[name].detach() * weight
                self._terms[name] = self._terms[name] + term if name in self._terms else term
        for layer, row in terms.get("counts", {}).items():
            self._counts[layer] = self._counts[layer] + row if layer in self._counts else row.detach()

    @property
    def num_tokens(self) -> int:
        """Tokens counted in so far."""
        return self._weight

    def mean(self, ranks: Ranks = ALONE) -> BatchLoss:
        """Means over all tokens, and sums of the counts; a term that no part had is zero.

        On several ranks the terms are shares, summed here; the counts are those of the job already.
        """
        means = {name: float(total) / self._weight for name, total in ranks.sums(self._terms).items()}
        return BatchLoss(
            means["loss"], means["task"], means.get("balance", 0.0), means.get("z", 0.0), dict(self._counts),
            means.get("kl"), means.get("hidden"),
        )  # fmt: skip
