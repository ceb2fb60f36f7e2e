"""Runs of the tiny decoder with a teacher of the same kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from moec.plan import Distill
from moec.runtime.data import Batch, TextData
from moec.runtime.distillation.lesson import Lesson
from moec.runtime.distillation.teacher import LiveTeacher
from moec.runtime.distillation.teaching import LateTeacher, Teaching
from moec.runtime.train import Trainer
from tests.runtime.tiny import TinyProgram, tiny_settings

STAGED = Distill(alpha=2.0, temperature=1.5, stop=0.5)
QUIET = Console(quiet=True)


def tiny_teacher(seed: int = 5, **how: Any) -> TinyProgram:
    """A decoder of other weights, whose words are far from evenly likely."""
    program = TinyProgram(width=10, seed=seed, **how)
    with torch.no_grad():
        program.embedding.mul_(8.0)
    return program


class NotingTeacher(LiveTeacher):
    """Keeps where it was asked, and what it said."""

    def __init__(self, program: TinyProgram, distill: Distill) -> None:
        super().__init__(program, distill)
        self.asked: list[tuple[int, int]] = []
        self.said: list[Lesson] = []

    def lesson(self, batch: Batch, position: int) -> Lesson:
        self.asked.append((position, len(batch[0])))
        self.said.append(super().lesson(batch, position))
        return self.said[-1]


def taught(
    student: TinyProgram, data: TextData, folder: Path, *, distill: Distill = STAGED,
    teacher: TinyProgram | LiveTeacher | LateTeacher | None = None, console: Console = QUIET,
    **changes: object,
) -> Trainer:  # fmt: skip
    """A trainer whose student has a teacher."""
    settings = tiny_settings(**changes)
    given = tiny_teacher() if teacher is None else teacher
    speaker = LiveTeacher(given, distill) if isinstance(given, TinyProgram) else given
    teaching = Teaching(speaker, distill, settings.steps)
    return Trainer(student, settings, data, folder, console=console, teaching=teaching)


def state(program: TinyProgram) -> dict[str, Tensor]:
    """Copies of all weights and buffers."""
    return {name: value.clone() for name, value in program.state_dict().items()}


def assert_equal_states(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """The same names and the same bits."""
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name
