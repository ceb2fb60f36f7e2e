"""What a distillation comes to, settled before any weight is read: plan, teacher, student, words, text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moec.commands.asked import Distillation, laid_over, require_right_folder, training_settings
from moec.commands.learn import require_room
from moec.commands.outline import Outline, outline_of
from moec.commands.programs import compiled
from moec.commands.tokenizer import open_tokenizer
from moec.errors import ArtifactError, DataError, PlanError, TrainError
from moec.models import is_saved_program
from moec.plan import Distill, Plan, Train
from moec.program import Program
from moec.runtime.checkpoint import latest_checkpoint, read_manifest
from moec.runtime.data import TextData, load_text
from moec.runtime.distillation.identity import identity_of_saved
from moec.runtime.distillation.stages import Stages
from moec.runtime.vocabulary import Vocabulary
from moec.teaching import require_fitting

#: Tables of a plan that say what a student is; the others may change when a run goes on.
SHAPING = ("student", "moe", "compile")


@dataclass(frozen=True)
class Course:
    """A distillation whose parts fit each other.

    `student` has its weights on `meta`, unless it was compiled for this. `teacher` is None when a run goes on
    in which it has no say any more, and it is gone; `identity` says which one it was.
    """

    asked: Distillation
    plan: Plan
    settings: Train
    terms: Distill
    teacher: Outline | None
    identity: Mapping[str, Any]
    student: Program
    words: Vocabulary
    data: TextData


def course_of(run: Distillation) -> Course:
    """Settle everything that can be settled without weights; every mistake is told here."""
    require_right_folder(run)
    plan = _plan(run)
    settings, terms = training_settings(plan.train, run.changed), terms_of(plan, run)
    record = _record(run) if run.resume else None
    teacher = None if record is not None and _is_gone(run, record, terms, settings) else _teacher(run)
    identity = record["teacher"] if record is not None else identity_of_saved(run.model, trust=run.trust)
    if teacher is not None:
        _require_same_teacher(run, identity)
    student = _student(run, plan, teacher)
    words = _words(run, teacher, student)
    plan = _fitted(run, plan, student, teacher)
    settings = training_settings(plan.train, run.changed)
    require_room(student, settings)
    if teacher is not None:
        require_room(teacher.program, settings)
        require_fitting(student, teacher.program, settings, terms)
    data = load_text(*run.data, sequence=settings.sequence, vocabulary=words)
    data.require_vocabulary(student.source.vocabulary)
    return Course(run, plan, settings, terms, teacher, identity, student, words, data)


def terms_of(plan: Plan, run: Distillation) -> Distill:
    """How the teacher counts: the plan's `[distill]`, or its defaults, and what was typed laid over it."""
    return laid_over(plan.distill or Distill(), run.taught)


# the plan


def _plan(run: Distillation) -> Plan:
    """The plan that was given; on a run that goes on, the one it began with must make the same student."""
    if run.resume:
        return _plan_again(run)
    if run.plan is not None:
        plan = Plan.resolve(run.plan)
        _require_one_student(run, plan)
        return plan
    if run.student is None:
        found = "no plan, and no --student"
        raise PlanError("moec distill", found, "a plan with a [student] table", "--plan mos")
    return outline_of(run.student, trust=run.trust).program.plan or Plan() if _is_saved(run) else Plan()


def _is_saved(run: Distillation) -> bool:
    return run.student is not None and is_saved_program(run.student)


def _require_one_student(run: Distillation, plan: Plan) -> None:
    if plan.student is None and run.student is None:
        needed = "[student] with depth or keep, or --student PROGRAM"
        raise PlanError(f"{run.plan}", "a plan without a [student] table", needed, "--plan mos")
    if plan.student is not None and run.student is not None:
        found = f"[student] in {run.plan}, and --student {run.student}"
        raise PlanError("--student", found, "one of them: a cut of the teacher, or a program")
    if plan.moe is not None and _is_saved(run):
        found = f"[moe] in {run.plan}, and --student {run.student}, which is a saved program"
        raise PlanError("--student", found, "a plan without [moe]: a saved program is what it is")


def _plan_again(run: Distillation) -> Plan:
    began = _start(run).program.plan
    assert isinstance(began, Plan)
    if run.plan is None:
        return began
    plan = Plan.resolve(run.plan)
    if _is_saved(run):
        return plan
    for table in SHAPING:
        if getattr(plan, table) != getattr(began, table):
            found = f"another [{table}] than the run in {run.out} began with"
            raise PlanError(run.plan, found, "the same student", "another --out, for another run")
    return plan


# a run that goes on


def _start(run: Distillation) -> Outline:
    """The student as the run began with it."""
    if not is_saved_program(str(run.start)):
        found = "a run without the student it began with"
        raise ArtifactError(run.out, found, "the --out of an earlier moec distill")
    return outline_of(str(run.start), trust=run.trust)


def _record(run: Distillation) -> Mapping[str, Any]:
    """What the newest checkpoint keeps; `step` is among it."""
    latest = latest_checkpoint(Path(run.out))
    assert latest is not None  # `require_right_folder` saw one
    manifest = read_manifest(latest)
    if "stages" not in manifest["record"]:
        found = "a run without a teacher"
        raise TrainError(str(latest), found, "the --out of an earlier moec distill", "moec train --resume")
    return {**manifest["record"], "step": manifest["step"]}


def _is_gone(run: Distillation, record: Mapping[str, Any], terms: Distill, settings: Train) -> bool:
    """Whether the teacher is not there, nor needed for what is left of the run: it has said its last, or
    what it says is stored."""
    stages = Stages(terms, settings.steps)
    stages.restore(record["stages"], record["step"])
    silent = not stages.teaches(record["step"]) or run.lessons is not None
    return silent and not is_saved_program(run.model)


def _require_same_teacher(run: Distillation, known: Mapping[str, Any]) -> None:
    found = identity_of_saved(run.model, trust=run.trust)
    odd = next((name for name in found if found[name] != known.get(name)), None)
    if odd is not None:
        told = f"another teacher than that of the run in {run.out}: {odd} {_short(found[odd])}"
        raise ArtifactError(run.model, told, f"{odd} {_short(known.get(odd))}", "another --out")


def _short(digest: object) -> str:
    return f"{digest}"[:12]


# teacher and student


def _teacher(run: Distillation) -> Outline:
    return outline_of(run.model, trust=run.trust)


def _student(run: Distillation, plan: Plan, teacher: Outline | None) -> Program:
    """The student without its weights; a model that is named is compiled here, once."""
    if run.resume:
        return _start(run).program
    if _is_saved(run):
        assert run.student is not None
        return outline_of(run.student, trust=run.trust).program
    if run.student is not None:
        return compiled(run.student, run.plan)
    assert teacher is not None
    assert plan.student is not None
    # Which layers are kept and what they hold at first takes weights; how many there are does not.
    plain = plan.student.model_copy(update={"by": "even", "init": "teacher"})
    return teacher.program.student(plan.model_copy(update={"student": plain}), verify="off")


def _fitted(run: Distillation, plan: Plan, student: Program, teacher: Outline | None) -> Plan:
    """The plan, with sequences that both have positions for where it does not say how long they are; it is
    that of a student that was compiled for this, too."""
    programs = [student] if teacher is None else [student, teacher.program]
    plan = plan.fitted(*(program.source.max_positions for program in programs))
    if run.student is not None and not run.resume and not _is_saved(run):
        student.plan = plan
    return plan


def _words(run: Distillation, teacher: Outline | None, student: Program) -> Vocabulary:
    """The words of teacher, student and text, which are the same."""
    known = teacher.tokenizer if teacher is not None else None
    own = student.source.tokenizer
    if known is not None and own is not None and known.digest != own.digest:
        found = f"a student trained with '{own.name}' ({own.digest[:12]})"
        needed = f"'{known.name}' ({known.digest[:12]}), as the teacher"
        raise DataError("tokenizer", found, needed)
    return open_tokenizer(run.tokenizer, known or own, "the teacher" if known else "the student")
