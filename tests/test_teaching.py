"""A student with a teacher against plain arithmetic, and what is refused before any training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import moec
from examples.gpt import GPT, GPTConfig
from moec.errors import DataError, MoecError, PlanError, TrainError
from moec.plan import Distill, Train
from moec.program import Program
from moec.runtime.batch_loss import BatchLoss
from moec.runtime.data import IGNORED, Batch
from moec.runtime.distillation.handover import MovedTeacher
from moec.runtime.distillation.lesson import Lesson
from moec.runtime.distillation.spread import Spread
from moec.runtime.distillation.teacher import LiveTeacher
from moec.runtime.simulated import run_ranks
from moec.runtime.step import OptimizerStep
from moec.runtime.train import Trainer
from moec.teaching import hidden_layers, made_from, require_fitting, teacher_of, teaching_of
from moec.testing.tolerances import error_of
from tests.plain_distillation import DENSE, SPARSE, VOCABULARY, Plain, compiled, gpt, plain_loss
from tests.runtime.tiny import tiny_settings, tiny_text

STUDENT, TEACHER = 2, 3
TRAIN = Train(steps=10, batch=4, sequence=5)


def batch_of(size: int = 4, seed: int = 0) -> Batch:
    """Tokens and targets of which a third, and all of the first sequence, do not count."""
    draw = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(VOCABULARY, (2, size, 5), generator=draw)
    targets[torch.rand(size, 5, generator=draw) < 0.33] = IGNORED
    targets[0] = IGNORED
    targets[-1, -1] = targets[1, 0] = 3
    return tokens, targets


CASES: dict[str, tuple[Any, Any, Distill, int]] = {
    "dense": (DENSE, DENSE, Distill(alpha=0.7, temperature=2.0, hidden=0.3, hidden_map=(0, 2)), 1),
    "experts": (SPARSE, SPARSE, Distill(alpha=0.5, hidden=2.0, hidden_map=(2, 0)), 1),
    "reverse, in two parts": (
        DENSE, SPARSE,
        Distill(alpha=1.5, temperature=0.7, direction="reverse", hidden=1.0, hidden_map=(1, 1)), 2,
    ),
    "words alone": (SPARSE, DENSE, Distill(alpha=0.9, temperature=3.0), 2),
    "hidden states alone": (DENSE, DENSE, Distill(alpha=0.0, hidden=1.0, hidden_map=(0, 1)), 1),
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "backend"), [*((case, "eager") for case in CASES), ("experts", "fused")], ids=str
)
def test_loss_and_gradients(case: str, backend: str) -> None:
    ours, theirs, distill, parts = CASES[case]
    student, teacher = compiled(STUDENT, ours, seed=1), compiled(TEACHER, theirs, seed=2)
    plain, told, batch = Plain(student, STUDENT), Plain(teacher, TEACHER), batch_of()
    layers = dict(enumerate(distill.hidden_map or ())) if distill.hidden else {}
    chunks = zip(*(side.chunk(parts) for side in batch), strict=True)
    losses = [plain_loss(plain, told, chunk, distill, layers) for chunk in chunks]
    needed = {name: torch.stack([loss[name] for loss in losses]).mean() for name in losses[0]}
    needed["loss"].backward()

    student.backend = teacher.backend = backend
    settings = TRAIN.model_copy(update={"accumulate": parts})
    step = OptimizerStep(student.train(), settings)
    found = step.gradients(batch, teaching_lessons(student, teacher, settings, distill))
    for name, value in needed.items():
        assert getattr(found, name) == pytest.approx(float(value.detach()), rel=1e-10, abs=1e-14), name
    gradients = {name: value.grad for name, value in student.named_parameters()}
    assert {*gradients} == {*plain.names.values()}
    largest = max(float(v.grad.abs().max()) for v in plain.model.parameters() if v.grad is not None)
    for name, value in plain.model.named_parameters():
        mine, wanted = gradients[plain.names[name]], value.grad
        assert mine is not None, name
        assert error_of(mine, torch.zeros_like(mine) if wanted is None else wanted, 0.1 * largest) <= 1e-10, (
            name
        )


def teaching_lessons(student: Program, teacher: Program, train: Train, distill: Distill) -> Any:
    """What the trainer hands to its steps."""
    teaching = teaching_of(student, teacher, train, distill)
    teaching.begin(student, 0)
    return teaching.lesson


class Misled:
    """Says something else wherever the first sequences' targets do not count."""

    def __init__(self, teacher: LiveTeacher, targets: Tensor) -> None:
        self.teacher, self.silent = teacher, (targets == IGNORED)[..., None]

    def lesson(self, batch: Batch, position: int) -> Lesson:
        """The lesson, wrong where nobody may look."""
        said = self.teacher.lesson(batch, position)
        assert isinstance(said.told, Tensor)
        hidden = {layer: state.masked_fill(self.silent, torch.nan) for layer, state in said.hidden.items()}
        return Lesson(said.told.masked_fill(self.silent, torch.nan), said.distill, hidden)


def test_what_a_teacher_says_where_nothing_counts_is_not_heard() -> None:
    distill, batch = Distill(hidden=1.0, hidden_map=(0, 2)), batch_of()
    teacher = compiled(TEACHER, SPARSE, seed=2)
    told = []
    for misled in (False, True):
        student = compiled(STUDENT, DENSE, seed=1)
        speaker = teacher_of(teacher, student, distill)
        assert isinstance(speaker, LiveTeacher)
        step = OptimizerStep(student.train(), TRAIN)
        loss = step.gradients(batch, (Misled(speaker, batch[1]) if misled else speaker).lesson)
        told.append((loss, [value.grad for value in student.parameters()]))
    (loss, gradients), (other, other_gradients) = told
    assert (loss.loss, loss.kl, loss.hidden) == (other.loss, other.kl, other.hidden)
    assert all(torch.equal(one, two) for one, two in zip(gradients, other_gradients, strict=True))  # type: ignore[arg-type]


def test_a_run_with_hidden_states(tmp_path: Path) -> None:
    """They count while the teacher speaks; afterwards the run is that of the task alone, to the bit."""
    torch.manual_seed(0)
    sizes = {"vocab": 256, "seq": 8, "width": 12, "heads": 2, "dropout": 0.1}
    teacher = moec.compile(GPT(GPTConfig(layers=3, **sizes)), SPARSE)  # type: ignore[arg-type]
    first = teacher.student(keep=[0, 2], verify="off")
    data, quiet = tiny_text(tmp_path), Console(quiet=True)
    settings = tiny_settings(steps=6, save_every=1, keep=9)
    distill = Distill(hidden=0.5, stop=0.5)

    def run(name: str, **how: Any) -> tuple[Program, Any]:
        student = copy.deepcopy(first)
        teaching = teaching_of(student, teacher, settings, distill)
        trainer = Trainer(student, settings, data, tmp_path / name, console=quiet, teaching=teaching)
        return student, trainer.run(**how)

    student, result = run("whole")
    heard = [record.hidden is not None for record in result.history]
    assert heard == [True] * 3 + [False] * 3
    assert student.fingerprint() == first.fingerprint()
    for at in (2, 4):  # in each stage
        run(f"at {at}", stop_at=at)
        again, rest = run(f"at {at}", resume=True)
        assert [r.loss for r in rest.history] == [r.loss for r in result.history[at:]]
        assert all(map(torch.equal, again.parameters(), student.parameters()))


def test_recomputed_insides() -> None:
    """Less is kept between forward and backward, and what comes out is the same."""
    distill, batch = Distill(hidden=1.0, hidden_map=(0, 1)), batch_of()
    student, teacher = compiled(STUDENT, SPARSE, seed=1), compiled(TEACHER, DENSE, seed=2)
    (loss, kept, gradients), (again, less, others) = (
        kept_by(copy.deepcopy(student), teacher, train, distill, batch)
        for train in (TRAIN, TRAIN.model_copy(update={"recompute": True}))
    )
    assert (loss.loss, loss.hidden) == (again.loss, again.hidden)
    assert less < 0.7 * kept
    assert all(map(torch.equal, gradients, others))


def kept_by(
    student: Program, teacher: Program, train: Train, distill: Distill, batch: Batch
) -> tuple[BatchLoss, int, list[Tensor]]:
    """The loss, how many numbers were kept for the backward pass, and the gradients."""
    kept: list[int] = []

    def keep(value: Tensor) -> Tensor:
        kept.append(value.numel())
        return value

    step = OptimizerStep(student.train(), train)
    lessons = teaching_lessons(student, teacher, train, distill)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        loss = step.gradients(batch, lessons)
    return loss, sum(kept), [value.grad for value in student.parameters() if value.grad is not None]


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"data": 2, "expert": 2}])
def test_ranks_learn_as_one_process(parallel: dict[str, int]) -> None:
    """Shares of the hidden distance, and gradients, added up over the ranks."""
    distill, batch = Distill(alpha=0.5, hidden=1.0, hidden_map=(0, 2)), batch_of()
    ours = {**SPARSE, "parallel": parallel}
    whole, teacher = compiled(STUDENT, SPARSE, seed=1), compiled(TEACHER, DENSE, seed=2)
    needed = OptimizerStep(whole.train(), TRAIN).gradients(batch, teacher_of(teacher, whole, distill).lesson)
    placed = moec.compile(gpt(STUDENT, 1), ours, world=2)
    assert placed.layout is not None

    def body(rank: int) -> tuple[Any, float]:
        local = placed.partition(rank).train()
        step = OptimizerStep(local, TRAIN)
        loss = step.gradients(batch, teacher_of(teacher, local, distill).lesson)
        step.optimizer.reduce()
        return loss, step.clip()

    told = run_ranks(placed.layout.mesh, body)
    whole_step = OptimizerStep(whole, TRAIN)
    for name in ("loss", "task", "kl", "hidden"):
        assert getattr(told[0][0], name) == pytest.approx(getattr(needed, name), rel=1e-10), name
    assert told[0][1] == pytest.approx(float(whole_step.optimizer.norm()), rel=1e-10)


# which layer is whose


def test_layers_that_a_student_was_made_from() -> None:
    teacher = compiled(4, SPARSE, seed=0)
    assert made_from(teacher.student(keep=[1, 3], verify="off"), teacher) == [1, 3]
    assert made_from(teacher.student(depth=3, verify="off"), teacher) == [0, 2, 3]
    dense = moec.compile(gpt(4), {**SPARSE, "student": {"keep": [0, 3]}})
    assert made_from(dense, teacher) == [0, 3]
    between = teacher.student(keep=[1, 2, 3], verify="off")
    assert made_from(between.student(keep=[0, 2], verify="off"), between) == [0, 2]


def refused(kind: type[MoecError], distill: Distill | None = None, **how: Any) -> str:
    student, teacher = how.get("student") or compiled(STUDENT, DENSE, seed=1), how.get("teacher")
    train = how.get("train", TRAIN)
    with pytest.raises(kind) as caught:
        require_fitting(student, teacher or compiled(TEACHER, DENSE, seed=2), train, distill or Distill())
    return str(caught.value)


def test_what_does_not_fit_is_refused() -> None:
    hidden = Distill(hidden=1.0)
    assert "width 12, and a teacher of width 8" in refused(
        PlanError, hidden, teacher=moec.compile(gpt(TEACHER, width=8), DENSE)
    )
    assert "a student of 13 words, and a teacher of 11" in refused(
        DataError, teacher=moec.compile(gpt(TEACHER, vocab=11), DENSE)
    )
    assert "a teacher of 4 positions" in refused(TrainError, teacher=moec.compile(gpt(TEACHER, seq=4), DENSE))
    assert "layer 0 of the student, which is not known" in refused(PlanError, hidden)
    assert "3 layers, and a student of 2" in refused(PlanError, Distill(hidden=1.0, hidden_map=(0, 1, 2)))
    assert "layer 3 of a teacher of 3 layers" in refused(PlanError, Distill(hidden=1.0, hidden_map=(0, 3)))
    assert "stop_step = 11" in refused(PlanError, Distill(stop_step=11))
    assert "a teacher of 13 words" in refused(PlanError, Distill(top_k=14))


def test_hidden_states_that_nobody_gives_are_missed() -> None:
    """A teacher made by hand, without layers: nothing is left out in silence."""
    hidden = Distill(hidden=1.0)
    with pytest.raises(PlanError, match="no layers to compare"):
        LiveTeacher(compiled(TEACHER, DENSE, seed=2), hidden)
    with pytest.raises(TrainError, match="gives no hidden states"):
        Lesson(torch.zeros(1, 1, VOCABULARY), hidden)


def test_the_student_is_no_teacher_of_itself() -> None:
    student = compiled(STUDENT, DENSE, seed=1)
    with pytest.raises(TrainError, match="weights of its own"):
        teaching_of(student, student, TRAIN, Distill()).begin(student, 0)


def test_handing_lessons_over_hides_no_teacher() -> None:
    student = compiled(STUDENT, DENSE, seed=1)
    speaker = LiveTeacher(student, Distill())
    spread = Spread.of(student, speaker.ranks)
    moved = MovedTeacher(speaker, spread, spread, speaker.ranks)
    with pytest.raises(TrainError, match="weights of its own"):
        teaching_of(student, moved, TRAIN, Distill()).begin(student, 0)


def test_layers_are_told_without_weights() -> None:
    """All of it is known of programs whose weights are on `meta`."""
    teacher = compiled(4, SPARSE, seed=0)
    student = teacher.student(depth=2, verify="off")
    for program in (teacher, student):
        program.to("meta")
    assert hidden_layers(student, teacher, Distill(hidden=1.0)) == {0: 0, 1: 3}
    require_fitting(student, teacher, TRAIN, Distill(hidden=1.0))
