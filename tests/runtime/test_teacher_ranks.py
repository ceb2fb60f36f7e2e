"""A student on the ranks of a mesh learns of its teacher what it learns in one process, wherever that is."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.errors import PassError
from moec.plan import Distill, Train
from tests.runtime.taught_runs import learn_alone, learn_on_ranks, student_of, teacher_of, uneven_batches

STEP = Train(batch=6, sequence=8, accumulate=2, lr=1e-2, clip=0.5)
DISTILL = Distill(alpha=0.7, temperature=1.5)
nightly = pytest.mark.nightly

Parallel = dict[str, Any]


def assert_alone_and_on_ranks(
    world: int, student: Parallel, teacher: Parallel | None, distill: Distill = DISTILL, step: Train = STEP
) -> None:
    """`teacher`: None for one that every rank holds whole; capacity is then that of a rank's own tokens, so
    it has none."""
    whole = teacher is None
    batches = uneven_batches(2, step.batch)
    speaker = teacher_of(dropless=True) if teacher is None else teacher_of(world, **teacher)
    found = learn_on_ranks(student_of(world, **student), speaker, distill, step, batches)
    found.assert_like(learn_alone(distill, step, batches, teacher_of(dropless=whole)))


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        pytest.param(2, {"tensor": 2}, id="tensor 2, words uneven"),
        pytest.param(4, {"expert": 2, "slice": 2}, id="data 4, expert 2, slice 2"),
        pytest.param(2, {"expert": 1}, id="data 2", marks=nightly),
        pytest.param(2, {"expert": 2}, id="expert 2", marks=nightly),
        pytest.param(4, {"tensor": 4, "expert": 4}, id="tensor 4", marks=nightly),
        pytest.param(4, {"tensor": 2, "expert": 2}, id="data 2, tensor 2", marks=nightly),
    ],
)
def test_on_the_mesh_of_the_student(world: int, parallel: Parallel) -> None:
    assert_alone_and_on_ranks(world, parallel, parallel)


@pytest.mark.parametrize(
    ("world", "student", "teacher"),
    [
        pytest.param(2, {"tensor": 2}, {"expert": 2}, id="teacher data 2, student tensor 2"),
        pytest.param(4, {"tensor": 2, "expert": 2}, {"expert": 4}, id="teacher data 4, student 2 × 2"),
        pytest.param(4, {"expert": 2}, {"expert": 4}, id="other experts", marks=nightly),
        pytest.param(4, {}, {"tensor": 4}, id="teacher tensor 4, student data 4", marks=nightly),
        pytest.param(4, {"tensor": 4}, {"tensor": 2, "slice": 2}, id="teacher 2 × 2, sliced", marks=nightly),
    ],
)
def test_on_another_mesh(world: int, student: Parallel, teacher: Parallel) -> None:
    assert_alone_and_on_ranks(world, student, teacher)


@pytest.mark.parametrize("student", [{"tensor": 2}, {"expert": 2}], ids=str)
def test_a_teacher_that_every_rank_holds_whole(student: Parallel) -> None:
    assert_alone_and_on_ranks(2, student, None)


@pytest.mark.parametrize("teacher", [None, {"tensor": 2}], ids=["whole", "tensor 2"])
def test_ranks_without_a_sequence(teacher: Parallel | None) -> None:
    step = STEP.model_copy(update={"batch": 1, "accumulate": 1})
    assert_alone_and_on_ranks(2, {}, teacher, step=step)


ARRANGED = st.builds(
    lambda tensor, expert, slices: {"tensor": tensor, "expert": expert, "slice": slices},
    st.sampled_from((1, 2, 4)), st.sampled_from((1, 2, 4)), st.sampled_from((1, 2)),
)  # fmt: skip


@nightly
@settings(max_examples=60)
@given(
    st.sampled_from((2, 4)), ARRANGED, st.none() | ARRANGED, st.integers(1, 2), st.integers(1, 3),
    st.sampled_from(("forward", "reverse")),
)  # fmt: skip
def test_any_two_meshes(
    world: int, student: Parallel, teacher: Parallel | None, parts: int, size: int, direction: str
) -> None:
    for parallel in filter(None, (student, teacher)):
        parallel["tensor"] = min(parallel["tensor"], world)
    step = STEP.model_copy(update={"batch": parts * size, "accumulate": parts})
    distill = DISTILL.model_copy(update={"direction": direction})
    assert_alone_and_on_ranks(world, student, teacher, distill, step)


def test_a_teacher_that_is_placed_has_the_students_of_one_that_is_not() -> None:
    """A program trained with `[parallel]` is saved placed; a student of it is cut from what it was before."""
    placed, whole = teacher_of(2, tensor=2), teacher_of()
    found, expected = (teacher.student(depth=1, verify="off") for teacher in (placed, whole))
    assert str(found) == str(expected)
    assert (found.stage, found.layout) == ("sparse", None)
    assert placed.stage == "placed"
    with pytest.raises(PassError, match="cut first, then placed"):
        placed.partition(0).student(depth=1)
