"""`moec distill` on several ranks: started here (`--nproc N`), or each by a launcher such as torchrun.

Each rank holds its part of the student, and of the teacher, which may be arranged otherwise: as its own plan
says, or as it was saved for as many ranks. The student is cut from the whole teacher, by every rank alike.
"""

from __future__ import annotations

import gc
from contextlib import ExitStack
from dataclasses import replace

from rich.console import Console

from moec.api import place as placed
from moec.commands.asked import Distillation
from moec.commands.course import Course, course_of
from moec.commands.distill import (
    Called,
    begun,
    concluded,
    distill,
    save_trained,
    teaching,
    tell_terms,
    write_about,
)
from moec.commands.job import place_in_job
from moec.commands.lessons import require_fitting_lessons
from moec.commands.programs import part_of, program_of
from moec.commands.ranks import TrainingRank, start_ranks
from moec.ir.mesh import Mesh
from moec.local_program import LocalProgram
from moec.plan import Plan
from moec.runtime.launch import INTERRUPTED, Place
from moec.runtime.manifest_records import layout_of
from moec.runtime.mesh import agree, connected
from moec.runtime.train import Trainer, TrainResult

TEACHER = "teacher"  # stands before the names of the teacher's axes


def distill_anywhere(run: Distillation) -> int:
    """`moec distill`: in this process, in processes started here, or as one rank; gives the status."""
    place = place_in_job("distill", run.nproc)
    if place is not None:
        return DistillingRank(run, place).run()
    if run.nproc is None:
        return distill(run)
    require_fitting_lessons(course_of(run))  # mistakes that need no processes to be seen
    return start_ranks(run, run.nproc)


class DistillingRank(TrainingRank):
    """One rank that is taught."""

    def __init__(self, run: Distillation, place: Place) -> None:
        super().__init__(run, place)
        self.asked: Distillation = run

    def work(self) -> int:
        """Distil together with the other ranks; gives the exit status."""
        run, world = self.asked, self.place.world
        with connected(Mesh(data=world)):
            agree("teacher", run.model)
            agree("plan", Plan.resolve(run.plan).to_toml())
        course = course_of(replace(run, resume=self._resumes()))
        require_fitting_lessons(course)
        local = self._student(course)
        mesh = local.layout.mesh
        if course.teacher is not None:
            mesh = mesh.joined(teacher_mesh(course, world))
        with ExitStack() as stack:
            stack.enter_context(self.watched(mesh, course.plan.parallel.timeout))
            stack.enter_context(self.followed(local.executed, local.backend in ("eager", "fused")))
            agree("settings", f"{course.settings} {course.terms}")
            result = self._learn_from_teacher(course, local)
        return concluded(course, local, result) if self.place.rank == 0 else INTERRUPTED * result.interrupted

    def _student(self, course: Course) -> LocalProgram:
        """This rank's part of the student; all make the whole, and rank 0 alone proves it."""
        run, place = course.asked, self.place
        parallel = course.plan.parallel
        if run.resume and (course.student.plan or Plan()).parallel == parallel:
            return part_of(str(run.start), None, place.rank, place.world, trust=run.trust)
        verify = None if place.rank == place.restarts == 0 else "off"
        whole = begun(course, Called(lambda: program_of(run.model, trust=run.trust)), verify=verify)
        whole.plan = (whole.plan or Plan()).model_copy(update={"parallel": parallel})
        local = placed(whole, place.world).partition(place.rank)
        del whole
        gc.collect()  # the wholes go before training needs the room
        return local

    def _learn_from_teacher(self, course: Course, local: LocalProgram) -> TrainResult:
        run, place = course.asked, self.place
        teacher = Called(self._teacher)
        console = Console(stderr=run.as_json)
        tell_terms(course, console)
        if not run.resume:
            local.save(run.start)
            write_about(course, teacher, first=place.rank == 0)
        trainer = Trainer(
            local, course.settings, course.data, run.out,
            plan=course.plan, console=console, teaching=teaching(course, teacher, local),
        )  # fmt: skip
        self.trail.step = lambda: trainer.step + 1
        result = trainer.run(resume=run.resume)
        if not result.interrupted:
            save_trained(course, local)
        return result

    def _teacher(self) -> LocalProgram:
        """This rank's part of the teacher."""
        run, place = self.asked, self.place
        part = part_of(run.model, None, place.rank, place.world, trust=run.trust).named(TEACHER)
        if part.backend in ("eager", "fused"):
            self.trail.overhear(part.executed, f"the {TEACHER}'s")
        return part


def teacher_mesh(course: Course, world: int) -> Mesh:
    """How the teacher lies on `world` ranks: as it was saved, or as its plan says; see `part_of`."""
    assert course.teacher is not None
    layout = layout_of(course.teacher.manifest)
    if layout is None or layout.mesh.world != world:
        layout = placed(course.teacher.program, world).layout
    assert layout is not None
    return layout.mesh.named(TEACHER)
