"""`moec distill … --lessons DIR`: what the teacher says is kept on disk, and computed where it is missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from moec.commands.course import Course
from moec.errors import PlanError
from moec.local_program import LocalProgram
from moec.plan import Distill
from moec.program import Program
from moec.runtime.distillation.lesson_files import MANIFEST, Facts, read_facts, shard_path
from moec.runtime.distillation.store import samples_taught, store_lessons
from moec.runtime.distillation.stored import StoredTeacher
from moec.runtime.distillation.teacher import LiveTeacher
from moec.runtime.ranks import Ranks, ranks_of

SHARD = 64  # samples a file


class SavedTeacher(LiveTeacher):
    """A live teacher that goes by the identity of the folder it was read from, as the run does."""

    def __init__(self, program: Program, distill: Distill, ranks: Ranks, known: Mapping[str, Any]) -> None:
        super().__init__(program, distill, ranks)
        self.known = known

    def identity(self) -> dict[str, Any]:
        """That of the saved program."""
        return dict(self.known)


def stored_facts(folder: str) -> Facts | None:
    """What the lessons in `folder` are of; None where there are none yet."""
    return read_facts(Path(folder)) if (Path(folder) / MANIFEST).is_file() else None


def require_fitting_lessons(course: Course) -> None:
    """Refuse settings that lessons on disk cannot serve, and those of another run; reads no lesson."""
    folder, terms = course.asked.lessons, course.terms
    if folder is None:
        return
    if terms.hidden > 0:
        found = f"hidden = {terms.hidden} with --lessons, which hold words alone"
        raise PlanError("distill.hidden", found, "hidden = 0, or no --lessons")
    if terms.top_k is None:
        found = "left out, and --lessons are to be stored"
        raise PlanError("distill.top_k", found, "how many words of each position to store", "top_k = 32")
    if stored_facts(folder) is not None:
        _open(course, course.student, range(0))


def stored_teacher(course: Course, open_teacher: Callable[[], Program], student: Program) -> StoredTeacher:
    """A teacher that speaks from `--lessons`; those that are missing are computed first, by the one that
    `open_teacher` gives. Every rank calls it."""
    folder, samples = course.asked.lessons, samples_taught(course.settings, course.terms)
    assert folder is not None
    facts = stored_facts(folder)
    if facts is None or any(not shard_path(Path(folder), first).is_file() for first in facts.firsts(samples)):
        _store(course, facts, open_teacher(), samples, student)
    return _open(course, student, samples)


def _store(course: Course, facts: Facts | None, teacher: Program, samples: range, student: Program) -> None:
    """Go on in the folder as it was begun, or begin it as this run reads it."""
    terms, settings = course.terms, course.settings
    if facts is not None:
        terms = terms.model_copy(update={"top_k": facts.top_k})
    # A teacher that is whole on every rank of the student's job reads there what falls to that rank.
    ranks = ranks_of(teacher if isinstance(teacher, LocalProgram) else student)
    batch = max(1, settings.batch // settings.accumulate // ranks.mesh.data)
    assert course.asked.lessons is not None
    store_lessons(
        SavedTeacher(teacher, terms, ranks, course.identity),
        course.data,
        settings.seed,
        samples,
        course.asked.lessons,
        batch=facts.batch if facts else batch,
        shard=facts.shard if facts else SHARD,
        console=Console(stderr=course.asked.as_json),
    )


def _open(course: Course, student: Program, samples: range) -> StoredTeacher:
    """The lessons, if they are those of this course."""
    assert course.asked.lessons is not None
    part = {"ranks": ranks_of(student)} if isinstance(student, LocalProgram) else {}
    return StoredTeacher(
        course.asked.lessons, course.terms, course.data, course.settings.seed,
        samples=samples, teacher=course.identity, vocabulary=student.source.vocabulary, **part,
    )  # fmt: skip
