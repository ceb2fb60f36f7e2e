"""The trainer on ranks with a teacher that lies on other ranks: runs that stop, go on, move, and fail."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from moec.errors import TrainError
from moec.plan import Distill
from moec.runtime.checkpoint import latest_checkpoint, load_checkpoint
from moec.runtime.data import Batch, TextData
from moec.runtime.distillation.lesson import Lesson
from moec.runtime.distillation.teacher import LiveTeacher, Teacher
from moec.runtime.distillation.teaching import Teaching
from moec.runtime.simulated import run_ranks
from moec.runtime.train import Trainer, TrainResult
from moec.runtime.trainable import Trainable
from tests.runtime.taught_runs import joined_mesh, student_of, teacher_of, told_by
from tests.runtime.tiny import tiny_settings, tiny_text

DISTILL = Distill(alpha=0.7, temperature=1.5, stop=0.6)
HOW: dict[str, Any] = {
    "steps": 5, "batch": 6, "accumulate": 2, "eval_every": 1, "save_every": 1, "keep": 9, "eval_batches": 1,
}  # fmt: skip
STUDENT, TEACHER = {"tensor": 2}, {"expert": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TextData:
    return tiny_text(tmp_path_factory.mktemp("text"))


def learn(
    program: Trainable, teacher: Teacher, data: TextData, folder: Path, distill: Distill = DISTILL,
    *, resume: bool = False, stop_at: int | None = None, **changes: Any,
) -> TrainResult:  # fmt: skip
    """A run of the trainer with a teacher, without a screen."""
    settings = tiny_settings(**{**HOW, **changes})
    teaching = Teaching(teacher, distill, settings.steps)
    trainer = Trainer(program, settings, data, folder, console=Console(quiet=True), teaching=teaching)
    return trainer.run(resume=resume, stop_at=stop_at)


def learn_on_two(data: TextData, folder: Path, distill: Distill = DISTILL, **how: Any) -> list[TrainResult]:
    """The same on two tensor ranks, with a teacher on two data ranks."""
    student, teacher = student_of(2, **STUDENT), teacher_of(2, **TEACHER)

    def body(rank: int) -> TrainResult:
        local = student.partition(rank)
        return learn(local, told_by(teacher, local, distill), data, folder, distill, **how)

    return run_ranks(joined_mesh(student, teacher), body)


def learn_alone(data: TextData, folder: Path, distill: Distill = DISTILL, **how: Any) -> TrainResult:
    return learn(student_of(), LiveTeacher(teacher_of(), distill), data, folder, distill, **how)


def told(*results: TrainResult) -> list[dict[str, float]]:
    """What was recorded of each step; nothing of the KL where nobody speaks."""
    rows = [row for result in results for row in result.history]
    known = [{"step": row.step, "loss": row.loss, "task": row.task, "kl": row.kl} for row in rows]
    return [{name: value for name, value in row.items() if value is not None} for row in known]


def weights(folder: Path) -> dict[str, Tensor]:
    path = latest_checkpoint(folder)
    assert path is not None
    return dict(load_checkpoint(path).tensors["parameters"])


def assert_close(found: TrainResult, expected: TrainResult) -> None:
    for mine, needed in zip(told(found), told(expected), strict=True):
        assert mine == pytest.approx(needed, rel=1e-9)
    assert [row.step for row in found.evaluations] == [row.step for row in expected.evaluations]
    for ours, theirs in zip(found.evaluations, expected.evaluations, strict=True):
        assert ours.evaluation.loss == pytest.approx(theirs.evaluation.loss, rel=1e-9)


def test_a_run_on_two_meshes_is_the_run_of_one_process(data: TextData, tmp_path: Path) -> None:
    """Stages, evaluations and checkpoints too; and the run goes on, on the same ranks or in one process."""
    alone = learn_alone(data, tmp_path / "one")
    first, second = learn_on_two(data, tmp_path / "two")
    assert told(first) == told(second)
    assert [row.kl is not None for row in first.history] == [True, True, True, False, False]
    assert_close(first, alone)
    learn_on_two(data, tmp_path / "parts", stop_at=2)
    moved = shutil.copytree(tmp_path / "parts", tmp_path / "moved")
    same, _ = learn_on_two(data, tmp_path / "parts", resume=True)
    assert told(same) == told(first)[2:]
    expected = weights(tmp_path / "two")
    found = weights(tmp_path / "parts")
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    other = learn_alone(data, moved, resume=True)
    for mine, needed in zip(told(other), told(alone)[2:], strict=True):
        assert mine == pytest.approx(needed, rel=1e-9)


def test_ranks_lose_patience_together(data: TextData, tmp_path: Path) -> None:
    distill = Distill(alpha=0.7, patience=1)
    alone = learn_alone(data, tmp_path / "one", distill, lr=0.3)
    for found in learn_on_two(data, tmp_path / "two", distill, lr=0.3):
        assert_close(found, alone)
        taught = [row.kl is not None for row in found.history]
        assert taught == sorted(taught, reverse=True)
        assert 0 < sum(taught) < len(taught), "the test needs a loss that stops falling on the way"


class Speechless:
    """A teacher that fails in its second lesson."""

    def __init__(self, inner: Teacher) -> None:
        self.inner, self.asked = inner, 0

    def identity(self) -> dict[str, Any]:
        return self.inner.identity()

    def lesson(self, batch: Batch, position: int) -> Lesson:
        self.asked += 1
        if self.asked == 2:
            raise TrainError("teacher", "no answer", "an answer")
        return self.inner.lesson(batch, position)


def test_a_teacher_that_fails_on_one_rank_ends_the_run(data: TextData, tmp_path: Path) -> None:
    student, teacher = student_of(2, **STUDENT), teacher_of(2, **TEACHER)

    def body(rank: int) -> TrainResult:
        local = student.partition(rank)
        given = told_by(teacher, local, DISTILL)
        return learn(local, Speechless(given) if rank == 1 else given, data, tmp_path / "run")

    with pytest.raises(TrainError, match="no answer") as caught:
        run_ranks(joined_mesh(student, teacher), body)
    assert caught.value.__notes__ == ["in rank 1"]


def test_ranks_with_other_teachers_do_not_begin(data: TextData, tmp_path: Path) -> None:
    student, teachers = student_of(2, expert=1), (teacher_of(), teacher_of(dropless=True))

    def body(rank: int) -> TrainResult:
        local = student.partition(rank)
        return learn(local, told_by(teachers[rank], local, DISTILL), data, tmp_path / "run")

    with pytest.raises(TrainError, match="another teacher on rank 1"):
        run_ranks(joined_mesh(student, teachers[0]), body)
    assert not (tmp_path / "run").exists()
