"""What a program is trained for: the loss, taken apart, with a teacher or without."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moec import ir
from moec.errors import DataError
from moec.runtime.data import IGNORED
from moec.runtime.distillation.lesson import Lesson
from moec.runtime.distillation.losses import hidden_loss, kl_loss, weighted, words_of
from moec.runtime.trainable import LossTerms


class Objective(ir.Program):
    """A program that has a loss; `moec.Program` is one."""

    @abstractmethod
    def tapped(self, layers: Iterable[int], verify: str = "auto") -> Objective:
        """The same program, whose terms hold hidden states too."""

    def loss(self, tokens: Tensor, targets: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The training loss: next-token cross-entropy plus the plan's balance and z terms; fp32 scalar.

        `targets` i64 [B, S]: what each position should say; left out, the next token (the last position has
        none). Positions with target -100, or where `mask` [B, S] is false, do not count.
        """
        return self.loss_terms(tokens, targets, mask)["loss"]

    def loss_terms(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        lesson: Lesson | None = None,
    ) -> LossTerms:
        """The loss, taken apart: `loss`, `task`, and for sparse programs `balance`, `z` (weighted) and
        `counts`.

        With a `lesson`, what a teacher says of the tokens, the loss has its terms too, and `kl` and `hidden`
        say how far the student is from it, at the positions that count. Where it speaks of hidden states, the
        program runs `tapped`.
        """
        running = self if lesson is None or not lesson.hidden else self.tapped(lesson.hidden)
        logits, terms = running.run(tokens)
        targets = self._targets(tokens, targets, mask)
        task = self._task_loss(logits, targets)
        found: LossTerms = {"loss": task, "task": task}
        if "counts" in terms:
            found |= {"balance": at_least_float(terms["balance"]), "z": at_least_float(terms["z"])}
            found |= {"loss": task + found["balance"] + found["z"], "counts": terms["counts"]}
        if lesson is None:
            return found
        return found | self._taught(logits, terms, targets, lesson, found["loss"])

    def _task_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return task_loss(logits, targets)

    def _taught(
        self, logits: Tensor, terms: Mapping[str, Any], targets: Tensor, lesson: Lesson, loss: Tensor
    ) -> LossTerms:
        """The total loss with a teacher's terms, and these."""
        counted, count = targets != IGNORED, self._count(targets)
        kl = kl_loss(logits, lesson, counted, count, words_of(self, logits))
        found: LossTerms = {"kl": kl}  # type: ignore[typeddict-item]
        if lesson.hidden:
            found["hidden"] = hidden_loss(terms["hidden"], lesson, counted, count)
        return found | {"loss": loss + weighted(lesson, kl, found.get("hidden"))}

    def _count(self, targets: Tensor) -> Tensor:
        """What sums over positions are divided by."""
        return (targets != IGNORED).sum()

    def _targets(self, tokens: Tensor, targets: Tensor | None, mask: Tensor | None) -> Tensor:
        """What each position is to say, `IGNORED` where it does not count."""
        if targets is None:
            if tokens.shape[1] < 2:
                raise DataError(
                    "program.loss", "one position and no targets", "two positions at least, or targets"
                )
            targets = F.pad(tokens[:, 1:], (0, 1), value=IGNORED)
        if targets.shape != tokens.shape:
            raise DataError("program.loss", f"targets {list(targets.shape)}", f"targets {list(tokens.shape)}")
        return targets if mask is None else targets.masked_fill(~mask.bool(), IGNORED)


def task_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in fp32 over the positions that count. logits [B, S, V], targets i64 [B, S]."""
    return F.cross_entropy(at_least_float(logits).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def at_least_float(value: Tensor) -> Tensor:
    """`value` in fp32, or in fp64 where it is: what losses are computed in."""
    return value.float() if value.dtype != torch.float64 else value
