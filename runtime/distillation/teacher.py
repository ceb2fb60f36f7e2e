"""Teachers: what speaks of a batch."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from moec.plan import Distill
from moec.runtime.data import Batch
from moec.runtime.distillation.identity import identity_of
from moec.runtime.distillation.lesson import Lesson
from moec.runtime.ranks import Ranks, ranks_of
from moec.runtime.rng import borrowed_rng
from moec.runtime.trainable import LocalTrainable, Trainable, in_mode


class Teacher(Protocol):
    """Something that speaks of batches."""

    def identity(self) -> dict[str, Any]:
        """What has to be the same, as JSON, for a resumed run to be the same run."""
        ...

    def lesson(self, batch: Batch, position: int) -> Lesson:
        """What it says of the batch of the whole job (two i64 `[B, S]`, on the CPU) whose first sample is
        number `position` of the run; the tokens of this rank's student, on its device. Every rank calls it.
        """
        ...


class LiveTeacher:
    """A program that is run: in eval mode, without gradients, leaving the random state alone.

    Its lessons lie on `ranks` as its logits do: those of the job that it is a part of, or those given, each
    of which holds the whole program and reads its stretch of a batch (expert capacity is then that of these
    tokens alone). Where the student's lie otherwise, see `handover.as_read_by`.
    """

    def __init__(self, program: Trainable, distill: Distill, ranks: Ranks | None = None) -> None:
        self.program, self.distill = program, distill
        self.ranks = ranks_of(program) if ranks is None else ranks

    def identity(self) -> dict[str, Any]:
        """The program's structure and a digest of its weights; every rank calls it."""
        return identity_of(self.program, self.ranks)

    def lesson(self, batch: Batch, position: int) -> Lesson:
        """See `Teacher`."""
        tokens = self.ranks.stretch(batch)[0].to(self.ranks.device)
        narrow = self.distill.dtype == "bf16"
        with (
            torch.no_grad(),
            in_mode(self.program, training=False),
            borrowed_rng(self.ranks.device),
            torch.autocast(tokens.device.type, torch.bfloat16, enabled=narrow),
        ):
            logits = self.program.run(self._readable(tokens))[0][: len(tokens)]
        return Lesson(logits, self.distill)

    def _readable(self, tokens: Tensor) -> Tensor:
        """A program that is whole reads one sequence at least; a rank may have none."""
        if len(tokens) or isinstance(self.program, LocalTrainable):
            return tokens
        return tokens.new_zeros(1, tokens.shape[1])
