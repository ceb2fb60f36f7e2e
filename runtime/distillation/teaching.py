"""A teacher in a run of training: it is asked while it speaks, and let go when it is done."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moec.errors import TrainError
from moec.plan import Distill, Train
from moec.runtime.data import Batch
from moec.runtime.distillation.lesson import Lesson
from moec.runtime.distillation.stages import Ending, Stages, require_evaluations
from moec.runtime.distillation.teacher import ProgramTeacher, Teacher
from moec.runtime.trainable import Trainable


@dataclass(frozen=True)
class LateTeacher:
    """A teacher that is opened when a run begins in which it has a say: `open()`, on every rank.

    `known` is its identity (see `identity_of_saved`). A run that goes on after it fell silent never opens it.
    What `open` is made of should not hold the teacher, or its memory stays taken.
    """

    open: Callable[[], Teacher]
    known: Mapping[str, Any]

    def identity(self) -> dict[str, Any]:
        """What has to be the same for a resumed run to be the same run."""
        return dict(self.known)


class Teaching:
    """`teacher` in a run of `steps` steps; `distill` says for how long it speaks, and how much it counts.

    Hand it to a `Trainer`. After the last stage the teacher is neither run nor held any more: its memory is
    free where nobody else holds it. Raises `PlanError` where the stages do not fit the run.
    """

    def __init__(self, teacher: Teacher | LateTeacher, distill: Distill, steps: int) -> None:
        self.distill, self.steps = distill, steps
        self.stages = Stages(distill, steps)
        self._given: Teacher | LateTeacher | None = teacher
        self._teacher: Teacher | None = None
        self._identity = teacher.identity()

    def require_fitting(self, train: Train) -> None:
        """Raise `TrainError` for a run of other steps, `PlanError` where patience would wait in vain."""
        if self.steps != train.steps:
            found = f"a Teaching for {self.steps} steps, and steps = {train.steps}"
            raise TrainError("teaching", found, f"Teaching(…, steps={train.steps})")
        require_evaluations(self.distill, train)

    def begin(self, student: Trainable, step: int, record: Mapping[str, Any] | None = None) -> None:
        """Get ready for the steps after `step`: those of a new run, or of one that kept `record`.

        Opens the teacher if it has a say in them. Raises `TrainError` for a teacher that was let go, and for
        one that has weights of the student's.
        """
        self.stages = Stages(self.distill, self.steps)
        if record is not None:
            self.stages.restore(record, step)
        if not self.speaks(step):
            self.let_go()
            return
        if self._teacher is None:
            self._teacher = self._opened()
        if isinstance(self._teacher, ProgramTeacher):
            _require_apart(self._teacher.program, student)

    def _opened(self) -> Teacher:
        if self._given is None:
            found = "a teacher that fell silent in an earlier run, and was let go"
            raise TrainError("teacher", found, "a new Teaching, for steps that it has a say in")
        return self._given.open() if isinstance(self._given, LateTeacher) else self._given

    def speaks(self, step: int) -> bool:
        """Whether the teacher speaks in the step after `step` steps were taken."""
        return self.stages.teaches(step)

    def ending(self, step: int) -> Ending | None:
        """How it came that the teacher is silent after `step` steps; None while it speaks, and where it
        speaks to the end of the run. Lets it go once it has said its last."""
        if self._teacher is not None and not self.speaks(step):
            self.let_go()
        return self.stages.ending(step)

    def let_go(self) -> None:
        """Hold the teacher no longer."""
        self._teacher = None
        if not isinstance(self._given, LateTeacher):
            self._given = None
        gc.collect()  # a graph of modules is a ring of references: its memory is wanted now

    def lesson(self, batch: Batch, position: int) -> Lesson:
        """What the teacher says of this part of the job's batch."""
        assert self._teacher is not None
        return self._teacher.lesson(batch, position)

    def identity(self) -> dict[str, Any]:
        """What has to be the same for a resumed run to be the same run."""
        return {"teacher": self._identity, "distill": self.distill.model_dump(mode="json")}

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return self.stages.record()


def _require_apart(teacher: Trainable, student: Trainable) -> None:
    """Training moves the student's weights; a teacher that has them would move along."""
    moved = {**dict(student.named_parameters()), **student.moe_biases()}
    owners = {tensor.untyped_storage().data_ptr(): name for name, tensor in moved.items()}
    for name, tensor in [*teacher.named_parameters(), *teacher.named_buffers()]:
        place = tensor.untyped_storage().data_ptr()
        if place and place in owners:
            found = f"its {name} is the student's {owners[place]}, which training moves"
            raise TrainError("teacher", found, "a teacher with weights of its own", "copy.deepcopy(program)")
