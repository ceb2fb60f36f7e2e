"""Which of the teacher's layers a student keeps."""

from __future__ import annotations

from collections.abc import Sequence

from moec.errors import PlanError
from moec.plan.training import Student


def kept_layers(
    student: Student, num_layers: int, importance: Sequence[float] | None = None
) -> tuple[int, ...]:
    """The teacher's layers that `student` keeps, ascending, of a teacher with `num_layers`.

    `keep` as it is given; `depth` spread evenly, the first and the last among them (24 → 21 leaves out 4, 11
    and 19; of a single layer, the first); or, by importance, the `depth` layers with the largest
    `importance`, one number a layer, the earlier of two that are alike. Raises `PlanError` for layers that
    the teacher does not have, for a depth that is not less than its own, and where importance was not
    measured.
    """
    if student.keep is not None:
        return _in_range(student.keep, num_layers)
    assert student.depth is not None
    if student.depth >= num_layers:
        found = f"depth = {student.depth}, the teacher has {num_layers} layers"
        raise PlanError("student.depth", found, "fewer", _largest(num_layers))
    if student.by == "even":
        return spread(student.depth, num_layers)
    if importance is None:
        raise unmeasured()
    if len(importance) != num_layers:
        raise ValueError(f"{len(importance)} importances of {num_layers} layers")
    ranked = sorted(range(num_layers), key=lambda layer: (-importance[layer], layer))
    return tuple(sorted(ranked[: student.depth]))


def spread(depth: int, num_layers: int) -> tuple[int, ...]:
    """`depth` of `num_layers` at even distances, first and last among them; of one, the first."""
    if depth == 1:
        return (0,)
    gaps = depth - 1
    return tuple((2 * i * (num_layers - 1) + gaps) // (2 * gaps) for i in range(depth))


def unmeasured() -> PlanError:
    """The error of a plan that asks for importance where there is no text to measure it on."""
    return PlanError(
        "student.by", 'by = "importance", and no text to measure it on', "text, or layers that are named",
        "program.student(plan, tokens=…), or keep = [0, 2, …]",
    )  # fmt: skip


def _in_range(keep: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    above = [layer for layer in keep if layer >= num_layers]
    if above:
        found = f"layer {above[0]}, the teacher has {num_layers} layers"
        raise PlanError("student.keep", found, f"layers from 0 to {num_layers - 1}", f"{num_layers - 1}")
    return keep


def _largest(num_layers: int) -> str:
    return f"depth = {num_layers - 1}" if num_layers > 1 else ""
