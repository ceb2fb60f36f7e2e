"""Teachers: what speaks of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from moec.errors import PlanError
from moec.plan import Distill
from moec.runtime.data import Batch
from moec.runtime.distillation.identity import identity_of
from moec.runtime.distillation.lesson import Lesson, TopWords
from moec.runtime.distillation.losses import words_of
from moec.runtime.distillation.top_words import top_words
from moec.runtime.ranks import Ranks, ranks_of
from moec.runtime.rng import borrowed_rng
from moec.runtime.trainable import LocalTrainable, Tappable, Trainable, in_mode


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


@runtime_checkable
class ProgramTeacher(Protocol):
    """What a `Teacher` has besides when a program is run here for what it says."""

    @property
    def program(self) -> Trainable:
        """What is run: on several ranks, this one's."""
        ...


class LiveTeacher:
    """A program that is run: in eval mode, without gradients, leaving the random state alone.

    Its lessons lie on `ranks` as its logits do: those of the job that it is a part of, or those given, each
    of which holds the whole program and reads its stretch of a batch (expert capacity is then that of these
    tokens alone). Where the student's lie otherwise, see `handover.as_read_by`. `hidden`: for layers of the
    student, the layer whose hidden states they are to have; the program is run `tapped` then. Raises
    `PlanError` where `distill` counts hidden states and no layers are given.
    """

    def __init__(
        self,
        program: Trainable,
        distill: Distill,
        ranks: Ranks | None = None,
        *,
        hidden: Mapping[int, int] | None = None,
    ) -> None:
        if distill.hidden and not hidden:
            found = f"hidden = {distill.hidden}, and no layers to compare"
            raise PlanError("distill.hidden", found, "moec.teaching_of(…), which finds them, or hidden = 0")
        self.program, self.distill, self.hidden = program, distill, dict(hidden or {})
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
            logits, terms = self._running().run(self._readable(tokens))
        hidden = {mine: terms["hidden"][its][: len(tokens)] for mine, its in self.hidden.items()}
        return Lesson(self._told(logits[: len(tokens)]), self.distill, hidden)

    def _told(self, logits: Tensor) -> Tensor | TopWords:
        """What the lesson says of the words: all of them, or the likeliest."""
        top_k, temperature = self.distill.top_k, self.distill.temperature
        if top_k is None:
            return logits
        return top_words(logits, top_k, temperature, words_of(self.program, logits))

    def _running(self) -> Trainable:
        """The program, giving hidden states where the student is to hear them."""
        if not self.hidden:
            return self.program
        assert isinstance(self.program, Tappable)
        return self.program.tapped(self.hidden.values())

    def _readable(self, tokens: Tensor) -> Tensor:
        """A program that is whole reads one sequence at least; a rank may have none."""
        if len(tokens) or isinstance(self.program, LocalTrainable):
            return tokens
        return tokens.new_zeros(1, tokens.shape[1])
