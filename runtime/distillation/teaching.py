"""A teacher in a run of training: it is asked while it speaks, and let go when it is done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moec.plan import Distill
from moec.runtime.data import Batch
from moec.runtime.distillation.lesson import Lesson
from moec.runtime.distillation.stages import Stages
from moec.runtime.distillation.teacher import Teacher


class Teaching:
    """`teacher` in a run of `steps` steps; `distill` says for how long it speaks, and how much it counts.

    Hand it to a `Trainer`. After the last stage the teacher is neither run nor held any more.
    """

    def __init__(self, teacher: Teacher, distill: Distill, steps: int) -> None:
        self.distill, self.stages = distill, Stages(distill, steps)
        self._teacher: Teacher | None = teacher
        self._identity = teacher.identity()

    def speaks(self, step: int) -> bool:
        """Whether the teacher speaks in the step after `step` steps were taken; lets it go where not."""
        if not self.stages.teaches(step):
            self._teacher = None
        return self._teacher is not None

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

    def restore(self, record: Mapping[str, Any]) -> None:
        """Go on from a record of an earlier run."""
        self.stages.restore(record)
