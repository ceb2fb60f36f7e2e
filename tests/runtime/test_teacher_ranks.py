"""A student on the ranks of a mesh learns of its teacher what it learns in one process, wherever that is."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec import teaching
from moec.cost.rank.counted_traffic import compared, predict_traffic
from moec.errors import PassError
from moec.ir.mesh import WORLD
from moec.local_program import LocalProgram
from moec.plan import Distill, Train
from moec.runtime.distillation.handover import MovedTeacher, traffic_of_move
from moec.runtime.distillation.spread import Parcels
from moec.runtime.distillation.teacher import LiveTeacher
from moec.runtime.ops.sent import Kind, Traffic
from moec.runtime.simulated import run_ranks
from moec.runtime.traffic import count_traffic
from tests.runtime.taught_runs import (
    VOCABULARY,
    Taught,
    joined_mesh,
    learn,
    learn_alone,
    learn_on_ranks,
    student_of,
    teacher_of,
    told_by,
    uneven_batches,
)

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
        pytest.param(4, {"expert": 2, "slice": 2}, id="data 4, expert 2, slice 2", marks=nightly),
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


@pytest.mark.parametrize(
    "student",
    [
        pytest.param({"tensor": 2}, id="student tensor 2"),
        pytest.param({"expert": 2}, id="student data 2", marks=nightly),
    ],
)
def test_a_teacher_that_every_rank_holds_whole(student: Parallel) -> None:
    assert_alone_and_on_ranks(2, student, None)


def test_a_teacher_that_reads_the_whole_batch_on_every_rank() -> None:
    """As a part of its own, on a mesh of one rank: its capacity is that of the batch, as in one process."""
    teacher, batches = teacher_of().partition(0), uneven_batches(2, STEP.batch)
    student = student_of(2, tensor=2)

    def body(rank: int) -> Taught:
        local = student.partition(rank)
        return learn(local, teaching.teacher_of(teacher, local, DISTILL), STEP, batches)

    expected = learn_alone(DISTILL, STEP, batches, teacher_of())
    for found in run_ranks(joined_mesh(student, teacher_of()), body):
        for mine, needed in zip(found.losses, expected.losses, strict=True):
            assert (mine.loss, mine.kl) == pytest.approx((needed.loss, needed.kl), rel=1e-10)


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({"top_k": 5}, id="likeliest words", marks=nightly),
        pytest.param({"hidden": 0.5, "hidden_map": (1,)}, id="hidden states", marks=nightly),
        pytest.param({"top_k": 3, "hidden": 0.5, "hidden_map": (0,)}, id="both"),
    ],
)
def test_what_else_a_lesson_holds(more: dict[str, Any]) -> None:
    distill = DISTILL.model_copy(update=more)
    assert_alone_and_on_ranks(2, {"tensor": 2}, {"expert": 2}, distill)
    losses = learn_alone(distill, STEP, uneven_batches(1, STEP.batch), teacher_of()).losses
    assert (losses[0].hidden is not None) == ("hidden" in more)


def test_what_a_lesson_sends_is_foretold() -> None:
    """The teacher's own exchanges, read off its graph, and the handing over, from the two meshes."""
    student, teacher = student_of(4, tensor=2, expert=2), teacher_of(4, expert=4)
    batch = uneven_batches(1, 6)[0]

    def body(rank: int) -> tuple[Traffic, MovedTeacher]:
        local = student.partition(rank)
        moved = told_by(teacher, local, DISTILL)
        assert isinstance(moved, MovedTeacher)
        with count_traffic() as traffic:
            moved.lesson(batch, 0)
        return traffic, moved

    ranks = run_ranks(joined_mesh(student, teacher), body)
    speaker = ranks[0][1].teacher
    assert isinstance(speaker, LiveTeacher)
    assert isinstance(speaker.program, LocalProgram)
    sizes = [tuple(part.shape) for part in batch[0].tensor_split(4)]
    routed = [counted.routed for counted, _ in ranks]
    mesh = speaker.program.layout.mesh
    foretold = predict_traffic(speaker.program.graph, mesh, sizes, routed, backward=False)
    for rank, ((counted, moved), own) in enumerate(zip(ranks, foretold, strict=True)):
        handed = traffic_of_move(Parcels(moved.have, moved.need, rank, 6, VOCABULARY), 8, 8)
        own.add(Kind("forward", WORLD, "all_to_all_single"), handed)
        assert compared(counted, own) == []
        assert handed.bytes > 0


@pytest.mark.parametrize(
    "teacher", [pytest.param(None, id="whole"), pytest.param({"tensor": 2}, id="tensor 2", marks=nightly)]
)
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
