"""Likeliest words and stored lessons on ranks are those of one process, on any mesh."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moec.errors import ArtifactError
from moec.plan import Distill
from moec.program import Program
from moec.runtime.data import TextData
from moec.runtime.distillation.lesson_files import read_shard, shard_path
from moec.runtime.distillation.store import StoredLessons, store_lessons
from moec.runtime.distillation.stored import StoredTeacher
from moec.runtime.distillation.teacher import LiveTeacher, Teacher
from moec.runtime.distillation.teaching import Teaching
from moec.runtime.ranks import ranks_of
from moec.runtime.simulated import run_ranks
from moec.runtime.train import Trainer
from moec.runtime.trainable import Trainable
from moec.testing.tolerances import error_of
from tests.runtime.taught_runs import learn_alone, learn_on_ranks, student_of, teacher_of, uneven_batches
from tests.runtime.tiny import tiny_settings, tiny_text
from tests.runtime.tiny_teaching import QUIET

TOP = Distill(alpha=2.0, temperature=1.5, top_k=7)


@pytest.fixture
def data(tmp_path: Path) -> TextData:
    return tiny_text(tmp_path)


@pytest.mark.parametrize(("world", "direction"), [(2, "forward"), (4, "reverse")])
def test_a_teacher_of_top_words_whose_vocabulary_is_dealt_out(world: int, direction: str) -> None:
    distill = TOP.model_copy(update={"direction": direction})
    settings, batches = tiny_settings(batch=6, accumulate=1), uneven_batches(2, 6)
    teacher = teacher_of(world, dropless=True, tensor=world)
    found = learn_on_ranks(student_of(world, tensor=world), teacher, distill, settings, batches)
    found.assert_like(learn_alone(distill, settings, batches, teacher_of(dropless=True)))


def test_top_words_are_handed_over_to_another_mesh() -> None:
    settings, batches = tiny_settings(batch=4, accumulate=1), uneven_batches(2, 4)
    found = learn_on_ranks(
        student_of(2, tensor=1), teacher_of(2, dropless=True, tensor=2), TOP, settings, batches
    )
    found.assert_like(learn_alone(TOP, settings, batches, teacher_of(dropless=True)))


def store(teacher: Program, data: TextData, folder: Path, count: int = 20) -> StoredLessons:
    """Lessons of a teacher that is whole, or by all ranks of a placed one; two sequences at once on each."""

    def body(rank: int) -> StoredLessons:
        speaker = teacher if teacher.layout is None else teacher.partition(rank)
        how = {"batch": 2, "shard": 6, "console": QUIET}
        return store_lessons(LiveTeacher(speaker, TOP), data, 0, range(count), folder, **how)

    if teacher.layout is None:
        return body(0)
    told = run_ranks(teacher.layout.mesh, body)
    assert all(one == told[0] for one in told)
    return told[0]


@pytest.mark.parametrize(("world", "tensor"), [(2, 2), (4, 2)])
def test_ranks_store_what_one_process_stores(data: TextData, tmp_path: Path, world: int, tensor: int) -> None:
    alone = store(teacher_of(dropless=True), data, tmp_path / "alone")
    placed = teacher_of(world, dropless=True, tensor=tensor)
    ranks = store(placed, data, tmp_path / "ranks")
    assert ranks.computed == 24
    assert ranks.facts == alone.facts  # a teacher is the same one wherever it lies
    for first in alone.facts.firsts(alone.samples):
        ours, theirs = (read_shard(made.folder, made.facts, first) for made in (ranks, alone))
        assert (ours[0] == theirs[0]).all()
        assert error_of(*(torch.from_numpy(side[1]) for side in (ours, theirs))) <= 1e-6
    # Of a folder with gaps the rest is computed: three shards on two or four ranks.
    for first in (0, 12, 18):
        shard_path(ranks.folder, first).unlink()
    assert store(placed, data, ranks.folder).computed == 18


def run(
    student: Trainable, teacher: Teacher, data: TextData, folder: Path
) -> tuple[list[float | None], list[Tensor]]:
    """The KL of every step of a run, and the weights after it."""
    settings = tiny_settings(batch=8, accumulate=2, steps=2)
    teaching = Teaching(teacher, TOP, settings.steps)
    result = Trainer(student, settings, data, folder, console=QUIET, teaching=teaching).run()
    return [row.kl for row in result.history], [value.clone() for _, value in student.named_parameters()]


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_student_on_ranks_learns_the_same_bits_from_disk(
    data: TextData, tmp_path: Path, tensor: int
) -> None:
    student, teacher = (of(2, tensor=tensor) for of in (student_of, partial(teacher_of, dropless=True)))
    assert student.layout is not None

    def body(rank: int) -> None:
        live, read = student.partition(rank), student.partition(rank)
        speaker, folder = LiveTeacher(teacher.partition(rank), TOP), tmp_path / "lessons"
        batch = 8 // (2 * live.layout.mesh.data)  # sequences of a part of a batch on a rank
        store_lessons(speaker, data, 0, range(16), folder, batch=batch, shard=6, console=QUIET)
        stored = StoredTeacher(folder, TOP, data, 0, ranks_of(read), samples=range(16))
        heard = run(live, speaker, data, tmp_path / "live")
        found = run(read, stored, data, tmp_path / "read")
        assert None not in heard[0]
        assert found[0] == heard[0]
        assert all(map(torch.equal, found[1], heard[1]))

    run_ranks(student.layout.mesh, body)


def test_all_ranks_refuse_alike(data: TextData, tmp_path: Path) -> None:
    made = store(teacher_of(dropless=True), data, tmp_path / "lessons")
    path = shard_path(made.folder, 6)
    path.write_bytes(path.read_bytes()[:-1])
    student = student_of(2, tensor=1)
    assert student.layout is not None

    def body(rank: int) -> str:
        ranks = ranks_of(student.partition(rank))
        with pytest.raises(ArtifactError) as caught:
            StoredTeacher(made.folder, TOP, data, 0, ranks)
        return str(caught.value)

    for said in run_ranks(student.layout.mesh, body):
        assert path.name in said
        assert "cut short" in said
