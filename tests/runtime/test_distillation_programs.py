"""Programs that moec compiled as teachers and students: parts of a batch, arithmetic, backends, ranks."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import moec
import moec.runtime.train as train_module
from examples.gpt import GPT, GPTConfig
from moec.api import place
from moec.plan import Distill, Train
from moec.program import Program
from moec.runtime.data import TextData
from moec.runtime.distillation.stages import Ending
from moec.runtime.distillation.teacher import LiveTeacher
from moec.runtime.distillation.teaching import Teaching
from moec.runtime.evaluate import evaluate
from moec.runtime.simulated import run_ranks
from moec.runtime.step import OptimizerStep
from moec.runtime.train import Trainer, TrainResult
from moec.runtime.trainable import Trainable
from tests.runtime.rank_runs import Steps, compiled, plan, random_batches
from tests.runtime.tiny import tiny_settings, tiny_text

STEP = Train(batch=8, sequence=8, lr=1e-2, clip=0.5)
STAGED = Distill(alpha=1.5, temperature=2.0, stop=0.67)
STAGES = ["distill"] * 4 + ["task"] * 2
NIGHTLY = pytest.mark.nightly


@pytest.fixture
def data(tmp_path: Path) -> TextData:
    return tiny_text(tmp_path)


def other(program: Program) -> Program:
    """The same program with other weights, far from evenly likely words."""
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for value in program.parameters():
            value.add_(0.3 * torch.randn(value.shape, generator=draw).to(value.dtype))
    return program


@functools.cache
def dense() -> Program:
    """A dense decoder in fp64, to be copied."""
    torch.manual_seed(0)
    config = GPTConfig(vocab=256, seq=8, layers=2, width=24, heads=3, dropout=0.0)
    return moec.compile(GPT(config).double(), {"compile": {"verify": "off"}})


def sparse(**how: Any) -> Program:
    """Experts in both layers, and dropout."""
    return compiled(plan(), dropout=0.2, **how)


def learn(student: Program, teacher: Program, settings: Train, distill: Distill = STAGED) -> Steps:
    """Three steps with a teacher."""
    step, speaker = OptimizerStep(student, settings), LiveTeacher(teacher, distill)
    student.train()
    torch.manual_seed(1)
    told = [step.take(batch, settings.lr, speaker.lesson) for batch in random_batches(3, settings.batch)]
    assert all(loss.kl is not None and loss.kl > 0.01 for loss, _ in told)
    losses, norms = [loss.loss for loss, _ in told], [norm for _, norm in told]
    return Steps(losses, norms, {name: value.detach() for name, value in student.named_parameters()})


def assert_close(found: Steps, expected: Steps, tolerance: float) -> None:
    """Relative to scale."""
    assert found.losses == pytest.approx(expected.losses, rel=tolerance)
    assert found.norms == pytest.approx(expected.norms, rel=tolerance)
    for name, value in expected.parameters.items():
        assert _apart(found.parameters[name], value) <= tolerance, name


def _apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-3))


def test_parts_of_a_batch_teach_what_the_whole_does() -> None:
    student = copy.deepcopy(dense())
    teacher = other(copy.deepcopy(dense()))
    whole = learn(copy.deepcopy(student), teacher, STEP)
    for parts in (2, 8):
        settings = STEP.model_copy(update={"accumulate": parts})
        assert_close(learn(copy.deepcopy(student), teacher, settings), whole, 1e-9)


def test_recomputation_changes_no_bit() -> None:
    again = STEP.model_copy(update={"recompute": True, "accumulate": 2})
    kept = STEP.model_copy(update={"accumulate": 2})
    found, expected = (learn(sparse(), other(sparse()), settings) for settings in (again, kept))
    assert (found.losses, found.norms) == (expected.losses, expected.norms)
    assert all(torch.equal(found.parameters[name], value) for name, value in expected.parameters.items())


@pytest.mark.parametrize(
    "fused", ["both", pytest.param("teacher", marks=NIGHTLY), pytest.param("student", marks=NIGHTLY)]
)
def test_the_fused_backend_teaches_and_learns_alike(fused: str) -> None:
    def made(name: str, backend: str) -> Program:
        program = compiled(plan())
        program.backend = backend
        return other(program) if name == "teacher" else program

    backends = {name: "fused" if fused in (name, "both") else "eager" for name in ("student", "teacher")}
    student, teacher = (made(name, backend) for name, backend in backends.items())
    expected = learn(made("student", "eager"), made("teacher", "eager"), STEP)
    assert_close(learn(student, teacher, STEP), expected, 1e-9)


def test_in_bf16_teacher_and_student_nearly_agree_with_fp32() -> None:
    def steps(dtype: str) -> Steps:
        distill = STAGED.model_copy(update={"dtype": dtype})
        student, teacher = (compiled(plan(), dtype=torch.float32) for _ in range(2))
        return learn(student, other(teacher), STEP.model_copy(update={"dtype": dtype}), distill)

    found, expected = steps("bf16"), steps("fp32")
    assert found.losses == pytest.approx(expected.losses, rel=2e-2)
    assert found.losses != expected.losses
    assert {value.dtype for value in found.parameters.values()} == {torch.float32}


# the trainer, on ranks


def run(
    student: Trainable, teacher: Trainable, data: TextData, folder: Path, distill: Distill = STAGED,
    **how: Any,
) -> TrainResult:  # fmt: skip
    """A run of the trainer, stopped and resumed where `how` says so."""
    wanted = {key: how.pop(key) for key in ("resume", "stop_at") if key in how}
    settings = tiny_settings(**{"steps": 6, "batch": 6, "eval_every": 2, "keep": 9, **how})
    teaching = Teaching(LiveTeacher(teacher, distill), distill, settings.steps)
    console = Console(quiet=True)
    return Trainer(student, settings, data, folder, console=console, teaching=teaching).run(**wanted)


def run_on_ranks(data: TextData, folder: Path, *args: Any, **how: Any) -> list[TrainResult]:
    """The same on two ranks, the teacher's parts where the student's are."""
    student, teacher = compiled(plan(expert=2), 2), place(other(compiled(plan(expert=2))), 2)
    assert student.layout is not None

    def body(rank: int) -> TrainResult:
        return run(student.partition(rank), teacher.partition(rank), data, folder, *args, **how)

    return run_ranks(student.layout.mesh, body)


def told(*results: TrainResult) -> list[tuple[float, float | None, str | None]]:
    """Loss, divergence and stage of every step."""
    return [(step.loss, step.kl, step.stage) for result in results for step in result.history]


@pytest.mark.parametrize("stop_at", [2, pytest.param(5, marks=NIGHTLY)])
def test_a_run_moves_to_other_ranks_with_its_teacher(data: TextData, tmp_path: Path, stop_at: int) -> None:
    """From one process to two, and is the same run."""
    whole = run(compiled(plan()), other(compiled(plan())), data, tmp_path / "whole")
    first = run(compiled(plan()), other(compiled(plan())), data, tmp_path / "moved", stop_at=stop_at)
    second = run_on_ranks(data, tmp_path / "moved", resume=True)
    found, expected = told(first, second[0]), told(whole)
    assert [stage for *_, stage in found] == [stage for *_, stage in expected] == STAGES
    assert [loss for loss, *_ in found] == pytest.approx([loss for loss, *_ in expected], rel=1e-9)
    kl = [[kl for _, kl, _ in run if kl is not None] for run in (found, expected)]
    assert kl[0] == pytest.approx(kl[1], rel=1e-9)
    assert len(kl[0]) == 4
    assert told(second[0]) == told(second[1])
    assert [result.silent for result in (whole, *second)] == [Ending(4, "stop = 0.67")] * 3


def test_ranks_lose_patience_together(
    data: TextData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They go by the same losses, to the bit; a run that was stopped waits on."""
    seen: list[float] = []

    def noted(*args: Any, **options: Any) -> Any:
        evaluation = evaluate(*args, **options)
        seen.append(evaluation.loss)
        return evaluation

    monkeypatch.setattr(train_module, "evaluate", noted)
    how = {"lr": 0.5, "steps": 8, "eval_every": 1, "log_every": 1}  # so fast that it gets worse
    distill = Distill(patience=2)
    whole = run_on_ranks(data, tmp_path / "whole", distill, **how)
    assert len(seen) == 16
    assert {seen.count(loss) for loss in seen} == {2}
    assert whole[0].silent == whole[1].silent
    assert whole[0].silent is not None
    last = whole[0].silent.step
    assert whole[0].silent.why == "patience = 2"
    assert last < 8
    first = run_on_ranks(data, tmp_path / "parts", distill, stop_at=last - 1, **how)
    second = run_on_ranks(data, tmp_path / "parts", distill, resume=True, **how)
    assert told(first[0], second[0]) == told(whole[0])
    assert second[1].silent == whole[1].silent
