"""The front door to distillation: a teacher for a student, everything checked before any training.

    teaching = moec.teaching_of(student, teacher, train, distill)
    Trainer(student, train, data, "run/", teaching=teaching).run()

What does not fit is told here: other words, too few positions, stages beyond the end of the run, hidden
states of other widths, layers that are not there.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from moec.errors import DataError, PassError, PlanError, TrainError
from moec.local_program import LocalProgram
from moec.passes.block_names import weights_of
from moec.passes.blocks import Block, blocks_of
from moec.plan import Distill, Train
from moec.plan.depth import kept_layers
from moec.program import Program
from moec.runtime.distillation.handover import as_read_by
from moec.runtime.distillation.stages import Stages, require_evaluations
from moec.runtime.distillation.teacher import LiveTeacher, Teacher
from moec.runtime.distillation.teaching import LateTeacher, Teaching
from moec.runtime.ranks import ranks_of


def teaching_of(
    student: Program,
    teacher: Program | Teacher | LateTeacher,
    train: Train,
    distill: Distill | None = None,
) -> Teaching:
    """`teacher` in a run of `student` as `train` says; hand it to the `Trainer`.

    `teacher`: a program, which is run beside the student (both whole, or both parts of their rank; a whole
    one on every rank will do); something that speaks otherwise, such as a `StoredTeacher`; or one that is
    opened late. `distill`: how much it counts and for how long; left out, as the student's plan says. Raises
    what `require_fitting` raises.
    """
    terms = terms_of(student, distill)
    if isinstance(teacher, Program):
        require_fitting(student, teacher, train, terms)
        return Teaching(teacher_of(teacher, student, terms), terms, train.steps)
    return Teaching(teacher, terms, train.steps)


def terms_of(student: Program, distill: Distill | None = None) -> Distill:
    """`distill`, else that of the student's plan, else the default."""
    planned = None if student.plan is None else student.plan.distill
    return distill or planned or Distill()


def teacher_of(teacher: Program, student: Program, distill: Distill) -> Teacher:
    """What runs `teacher` and says of each batch what `student` is to hear, on the student's ranks.

    Where hidden states count, both are tapped here: afterwards nothing is left to refuse.
    """
    heard = hidden_layers(student, teacher, distill) if distill.hidden else {}
    if heard:
        student.tapped(heard)
    ranks = ranks_of(teacher if isinstance(teacher, LocalProgram) else student)
    return as_read_by(LiveTeacher(teacher, distill, ranks, hidden=heard), student)


def require_fitting(student: Program, teacher: Program, train: Train, distill: Distill) -> None:
    """Raise where `student` cannot learn from `teacher`; needs no weights, which may be on `meta`.

    `DataError` for other vocabularies, `TrainError` for sequences longer than either has positions for,
    `PlanError` for stages that do not fit the run, for more likeliest words than there are, and for hidden
    states that cannot be compared.
    """
    Stages(distill, train.steps)
    require_evaluations(distill, train)
    ours, theirs = student.source.vocabulary, teacher.source.vocabulary
    if ours != theirs:
        found = f"a student of {ours} words, and a teacher of {theirs}"
        raise DataError("vocabulary", found, "one vocabulary for both")
    if distill.top_k is not None and distill.top_k > theirs:
        found = f"top_k = {distill.top_k}, and a teacher of {theirs} words"
        raise PlanError("distill.top_k", found, f"at most {theirs}", "no top_k, for all words")
    for who, program in (("student", student), ("teacher", teacher)):
        limit = program.source.max_positions
        if limit is not None and train.sequence > limit:
            found = f"sequences of {train.sequence} tokens, and a {who} of {limit} positions"
            raise TrainError("train.sequence", found, f"at most {limit}", f"sequence = {limit}")
    if distill.hidden:
        hidden_layers(student, teacher, distill)


def hidden_layers(student: Program, teacher: Program, distill: Distill) -> dict[int, int]:
    """For each layer of the student, the teacher's whose output it is to have.

    `distill.hidden_map`, or the teacher's layers that the student was made from. Raises `PlanError` where
    the map does not fit, where nothing tells the layers, and for hidden states of other widths.
    """
    ours, theirs = _blocks(student, "student"), _blocks(teacher, "teacher")
    widths = [_width(blocks[0].exit) for blocks in (ours, theirs)]
    if widths[0] != widths[1]:
        found = f"a student of width {widths[0]}, and a teacher of width {widths[1]}"
        raise PlanError("distill.hidden", found, "the same width", "hidden = 0")
    if distill.hidden_map is None:
        return dict(enumerate(made_from(student, teacher)))
    _require_map(distill.hidden_map, len(ours), len(theirs))
    return dict(enumerate(distill.hidden_map))


def made_from(student: Program, teacher: Program) -> list[int]:
    """The layer of `teacher` that each layer of `student` was made from, told by the origins of its weights;
    where layers share their weights, by the student's plan. Raises `PlanError` where neither tells."""
    ours, theirs = _blocks(student, "student"), _blocks(teacher, "teacher")
    known = _layers_by_name(_whole(teacher), theirs)
    found = [_one_layer(_whole(student), block, known) for block in ours]
    planned = _planned(student, len(theirs))
    if len(planned) == len(ours):
        found = [plan if layer is None else layer for plan, layer in zip(planned, found, strict=True)]
    if None in found:
        told = f"layer {found.index(None)} of the student, which is not known to be a layer of the teacher"
        suggested = ", ".join(map(str, range(min(len(ours), 4)))) + (", …" if len(ours) > 4 else "")
        needed = "for each of the student's layers, one of the teacher's"
        raise PlanError("distill.hidden_map", told, needed, f"hidden_map = [{suggested}]")
    return [layer for layer in found if layer is not None]


def _require_map(layers: Sequence[int], ours: int, theirs: int) -> None:
    if len(layers) != ours:
        found = f"{len(layers)} layers, and a student of {ours}"
        raise PlanError("distill.hidden_map", found, f"one of the teacher's for each of the {ours}")
    above = [layer for layer in layers if layer >= theirs]
    if above:
        found = f"layer {above[0]} of a teacher of {theirs} layers"
        raise PlanError("distill.hidden_map", found, f"layers from 0 to {theirs - 1}", f"{theirs - 1}")


def _whole(program: Program) -> Program:
    return program.whole if isinstance(program, LocalProgram) else program


def _blocks(program: Program, who: str) -> list[Block]:
    try:
        return blocks_of(_whole(program).graph)
    except PassError as error:
        raise PlanError(f"distill.hidden, {who}: {error.where}", error.found, error.needed) from error


def _width(exit_: fx.Node) -> int:
    return int(exit_.meta["val"].shape[-1])


def _layers_by_name(teacher: Program, blocks: Sequence[Block]) -> dict[str, set[int]]:
    """The layers that read a weight, by what it is called in the teacher and in what that was made from."""
    found: dict[str, set[int]] = {}
    for block in blocks:
        for name in weights_of(teacher, block):
            for called in (teacher.origins.public_name(name), teacher.origins[name].source):
                found.setdefault(called or "", set()).add(block.index)
    return found


def _one_layer(student: Program, block: Block, known: dict[str, set[int]]) -> int | None:
    """The one layer of the teacher that all weights of a block come from, as far as they tell."""
    names = [student.origins[name].teacher for name in weights_of(student, block)]
    told = [known[name] for name in names if name and name in known]
    common = set.intersection(*told) if told else set[int]()
    return common.pop() if len(common) == 1 else None


def _planned(student: Program, num_layers: int) -> tuple[int, ...]:
    """The layers that the student's plan keeps of a teacher of `num_layers`; none where it does not tell."""
    asked = None if student.plan is None else student.plan.student
    if asked is None or asked.by == "importance":
        return ()
    try:
        return kept_layers(asked, num_layers)
    except PlanError:
        return ()  # of another teacher
