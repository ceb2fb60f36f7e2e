"""`moec distill`: a student learns a text, and what a teacher says of it.

    RUN/student/         the student before it learned anything: what a run that goes on begins with
    RUN/teacher.json     which teacher it was, its size, and its held-out loss
    RUN/program/         the student in the end; beside these what `moec train` writes

A run that goes on when the teacher has said its last needs no teacher any more, nor its folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from moec.commands.asked import Distillation
from moec.commands.course import Course, course_of
from moec.commands.learn import finish
from moec.commands.lessons import require_fitting_lessons, stored_teacher
from moec.commands.programs import program_of
from moec.commands.screen import show, show_table
from moec.commands.tokenizer import record_tokenizer
from moec.local_program import LocalProgram
from moec.models import is_saved_program
from moec.program import Program
from moec.runtime.distillation.teacher import Teacher
from moec.runtime.distillation.teaching import LateTeacher, Teaching
from moec.runtime.evaluate import evaluate
from moec.runtime.train import Trainer, TrainResult
from moec.teaching import teacher_of

ABOUT = "teacher.json"


class Called:
    """A teacher that is opened when it is first called for. It is handed on once, and not held after that:
    whoever has it then lets it go."""

    def __init__(self, open_program: Callable[[], Program]) -> None:
        self._open = open_program
        self._held: list[Program] = []

    def program(self) -> Program:
        """The program, to look at."""
        if not self._held:
            self._held.append(self._open().eval())
        return self._held[0]

    def hand_over(self) -> Program:
        """The program, to keep; the next call opens it anew."""
        program = self.program()
        self.let_go()
        return program

    def let_go(self) -> None:
        """Hold nothing."""
        self._held.clear()


def distill(run: Distillation) -> int:
    """Distil in this process, save the trained student in `out/program`; gives the exit status."""
    course = course_of(run)
    require_fitting_lessons(course)
    console = Console(stderr=run.as_json)
    teacher = Called(lambda: program_of(run.model, trust=run.trust))
    student = begun(course, teacher)
    tell_terms(course, console)
    if not run.resume:
        student.save(run.start)
        write_about(course, teacher)
    trainer = Trainer(
        student,
        course.settings,
        course.data,
        run.out,
        plan=course.plan,
        console=console,
        teaching=teaching(course, teacher, student),
    )
    result = trainer.run(resume=run.resume)
    if not result.interrupted:
        save_trained(course, student)
    return concluded(course, student, result)


def save_trained(course: Course, student: Program) -> None:
    """The student as it is in the end, in `RUN/program`."""
    record_tokenizer(student, course.words)
    student.eval().save(course.asked.program)


def tell_terms(course: Course, console: Console) -> None:
    """Say by what the student is taught where the plan does not."""
    if course.plan.distill is None:
        terms = course.terms
        told = f"alpha {terms.alpha:g}, temperature {terms.temperature:g}, stop {terms.stop:g}"
        console.print(f"no [distill] in the plan: {told}", markup=False, highlight=False, soft_wrap=True)


def begun(course: Course, teacher: Called, verify: str | None = None) -> Program:
    """The student with its weights: those that a run goes on from are put into it later."""
    run = course.asked
    if run.resume:
        return program_of(str(run.start), trust=run.trust)
    if run.student is None:
        return teacher.program().student(
            course.plan, tokens=importance_text(course), verify=verify or course.plan.compile.verify
        )
    if is_saved_program(run.student):
        return program_of(run.student, trust=run.trust)
    return course.student  # it was compiled


def importance_text(course: Course) -> Any:
    """Held-out text i64 [B, S] by which layers are weighed, where the plan asks for that."""
    chosen = course.plan.student
    if chosen is None or chosen.by != "importance":
        return None
    return next(course.data.held_out_batches(course.settings.batch, 1))[0]


def teaching(course: Course, teacher: Called, student: Program) -> Teaching:
    """The teacher in this run, opened where it has a say."""

    def opened() -> Teacher:
        if course.asked.lessons is not None:
            stored = stored_teacher(course, teacher.hand_over, student)
            teacher.let_go()  # it was looked at, and is not needed where all was stored
            return stored
        return teacher_of(teacher.hand_over(), student, course.terms)

    made = Teaching(LateTeacher(opened, course.identity), course.terms, course.settings.steps)
    if not made.stages.last:
        teacher.let_go()
    return made


# what is told of teacher and student


def write_about(course: Course, teacher: Called, *, first: bool = True) -> None:
    """Keep what is known of the teacher; it may be gone when the run ends. The `first` rank writes."""
    settings, program = course.settings, teacher.program()
    evaluation = evaluate(program, course.data, settings, batches=settings.eval_batches)
    about = {
        "teacher": course.asked.model, **facts_of(program), "held_out_loss": evaluation.loss,
        "identity": dict(course.identity),
    }  # fmt: skip
    if first:
        path = Path(course.asked.out) / ABOUT
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{ABOUT}")
        draft.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        draft.replace(path)


def read_about(course: Course) -> dict[str, Any]:
    """What `write_about` kept; nothing where the file was taken away, or damaged."""
    try:
        about = json.loads((Path(course.asked.out) / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def facts_of(program: Program) -> dict[str, Any]:
    """How large it is, with the parts of all ranks."""
    whole = program.whole if isinstance(program, LocalProgram) else program
    return {"parameters": whole.num_parameters(), "active": whole.num_parameters(active=True)}


def concluded(course: Course, student: Program, result: TrainResult) -> int:
    """Compare teacher and student, and name the next commands; gives the exit status."""
    if result.interrupted:
        return finish(course.asked, result)
    loss = result.final.loss if result.final else None
    about, own = read_about(course), {**facts_of(student), "held_out_loss": loss}
    silent = None if result.silent is None else {"step": result.silent.step, "why": result.silent.why}
    if not course.asked.as_json:
        show_comparison({"teacher": about, "student": own})
    return finish(course.asked, result, {"teacher": about, "student": own, "silent": silent})


def show_comparison(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """A row for the teacher, and one for the student; what is not known is left open."""
    facts = ("parameters", "active", "held_out_loss")
    show("")
    show_table(
        ("", *(fact.replace("_", "-", 1).replace("_", " ") for fact in facts)),
        [(who, *(_cell(told.get(fact)) for fact in facts)) for who, told in rows.items()],
    )
    show("")


def _cell(value: object) -> object:
    return f"{value:.4f}" if isinstance(value, float) else "" if value is None else value
