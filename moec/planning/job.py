"""What is to be run, and what counts: the objective, and how much of it there is at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from moec.errors import PlanError, nearest
from moec.foresight import Phase
from moec.plan import Plan
from moec.program import Program

Objective = Literal["latency", "throughput", "training"]
LONGEST, LARGEST = 1024, 1 << 16


@dataclass(frozen=True)
class Job:
    """`objective`: shortest time of a decoded token (`latency`), most decoded tokens a second (`throughput`),
    shortest training step (`training`).

    `batch`: sequences on all ranks together, None: as many as fit (throughput). `length`: tokens of a
    sequence in training, else positions that the cache has room for, all of which attention runs over.
    `parts`: that a training step is computed in.
    """

    objective: Objective
    batch: int | None
    length: int
    parts: int = 1

    @classmethod
    def of(
        cls,
        program: Program,
        objective: str,
        world: int,
        *,
        batch: int | None = None,
        sequence: int | None = None,
        past: int | None = None,
    ) -> Job:
        """The job with what is left out filled in: a sequence for every rank, or the plan's training batch;
        the plan's sequences; 1024 positions, or as many as the model has. Raises `PlanError` for an unknown
        objective, or sizes that are not of it."""
        known = checked(objective)
        foreign = [name for name, size, own in (("sequence", sequence, known == "training"),
                   ("past", past, known != "training")) if size is not None and not own]  # fmt: skip
        if foreign:
            needed = "sequence" if known == "training" else "past"
            raise PlanError(f"--{foreign[0]}", f"a size that {known} does not have", f"--{needed}")
        most = program.source.max_positions or LONGEST
        length = sequence if known == "training" else past
        if length is not None and length > (program.source.max_positions or length):
            raise PlanError("length", f"{length} positions", f"at most {most}, the model's limit")
        train = (program.plan or Plan()).train
        if known == "training":
            given = batch or (train.batch if "batch" in train.model_fields_set else world)
            asked = train.sequence if "sequence" in train.model_fields_set else most
            return cls(known, given, length or min(asked, most), train.accumulate)
        whole = batch if known == "throughput" else batch or world
        return cls(known, whole, length or min(LONGEST, most))

    @property
    def phase(self) -> Phase:
        """What of the program runs."""
        return "training" if self.objective == "training" else "decode"

    def batches(self, data: int) -> Iterator[int]:
        """Sequences of one data rank, ascending, of the sizes that can be tried on `data` ranks."""
        if self.batch is not None:
            if self.batch % (data * self.parts) == 0:
                yield self.batch // (data * self.parts)
            return
        size = 1
        while size <= LARGEST:
            yield size
            size *= 2

    def letters(self, batch: int) -> dict[str, int]:
        """The letters of a cost, with `batch` sequences on one data rank."""
        if self.objective == "training":
            return {"B": batch, "S": self.length}
        return {"B": batch, "n": 1, "m": 1, "L": self.length}

    def score(self, seconds: float, batch: int, data: int) -> float:
        """What is to be small: seconds, or seconds for every token of all ranks."""
        return seconds / (batch * data) if self.objective == "throughput" else seconds

    def __str__(self) -> str:
        of = f"{self.batch} sequences" if self.batch is not None else "as many sequences as fit"
        if self.objective == "training":
            return f"training, {of} of {self.length} tokens a step"
        return f"{self.objective} of decoding, {of} on all ranks, {self.length} positions"


def checked(objective: str) -> Any:
    """The objective; raises `PlanError` with the nearest one."""
    known = get_args(Objective)
    if objective not in known:
        raise PlanError(
            "objective", f"'{objective}'", f"one of {', '.join(known)}", nearest(objective, known)
        )
    return objective
