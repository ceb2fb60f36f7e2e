"""A run with a teacher: what is recorded and shown, and that a silent teacher leaves no trace."""

from __future__ import annotations

import gc
import io
import math
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from moec.errors import PlanError, TrainError
from moec.plan import Distill, LayerSettings
from moec.runtime.checkpoint import load_checkpoint
from moec.runtime.data import TextData
from moec.runtime.display import TrainingDisplay
from moec.runtime.distillation.stages import Ending
from moec.runtime.distillation.teacher import LiveTeacher
from moec.runtime.distillation.teaching import LateTeacher, Teaching
from moec.runtime.records import StepRecord, read_records
from moec.runtime.schedule import learning_rate
from moec.runtime.snapshot import restore_random, restore_snapshot
from moec.runtime.step import OptimizerStep
from moec.runtime.train import Trainer
from tests.runtime.tiny import LAYER, TinyProgram, tiny_settings, tiny_text
from tests.runtime.tiny_teaching import (
    QUIET,
    STAGED,
    NotingTeacher,
    assert_equal_states,
    state,
    taught,
    tiny_teacher,
)


@pytest.fixture
def data(tmp_path: Path) -> TextData:
    return tiny_text(tmp_path)


# what is written down and shown


def test_records_say_what_the_teacher_cost(data: TextData, tmp_path: Path) -> None:
    told = taught(TinyProgram(), data, tmp_path / "run", steps=6).run()
    rows = [row for row in read_records(tmp_path / "run/train.jsonl") if row["kind"] == "step"]
    plain = {
        "kind", "step", "loss", "task", "balance", "z", "lr", "grad_norm", "tokens_per_second", "load",
    }  # fmt: skip
    for row in rows[:3]:
        assert row.keys() == plain | {"kl", "alpha", "temperature", "stage"}
        assert (row["stage"], row["alpha"], row["temperature"]) == ("distill", 2.0, 1.5)
        assert row["loss"] == pytest.approx(row["task"] + row["balance"] + 2.0 * 1.5**2 * row["kl"])
        assert row["kl"] > 0.01
    for row in rows[3:]:
        assert row.keys() == plain | {"stage"}
        assert row["stage"] == "task"
        assert row["loss"] == pytest.approx(row["task"] + row["balance"], rel=1e-6)
    assert told.silent == Ending(3, "stop = 0.5")
    assert [record.kl for record in told.history] == [row.get("kl") for row in rows]


def test_tensorboard_draws_the_teacher_and_the_stage(data: TextData, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told = taught(TinyProgram(), data, tmp_path, steps=4).run()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()

    def drawn(name: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in board.Scalars(f"train/{name}")]

    assert drawn("stage") == [(1, 1.0), (2, 1.0), (3, 0.0), (4, 0.0)]
    assert drawn("alpha") == [(1, 2.0), (2, 2.0)]
    assert drawn("temperature") == [(1, 1.5), (2, 1.5)]
    kl = [value for _, value in drawn("kl")]
    assert kl == pytest.approx([record.kl for record in told.history[:2]])


def lines(folder: Path, data: TextData, **how: Any) -> list[str]:
    """What a run prints where there is no terminal."""
    with (folder / "out").open("w") as file:
        taught(TinyProgram(), data, folder / "run", console=Console(file=file, width=200), **how).run()
    return (folder / "out").read_text().splitlines()


def test_lines_say_the_stage_and_when_it_ends(data: TextData, tmp_path: Path) -> None:
    first, second, silent, third, fourth, last = lines(tmp_path, data, steps=4)
    assert first.startswith("step 1/4  stage distill  task 5.")
    assert "  kl " in first
    assert "  kl " in second
    assert silent == "the teacher is silent after step 2 (stop = 0.5): the task loss alone"
    assert third.startswith("step 3/4  stage task  task 5.")
    assert "kl" not in third + fourth
    assert "held-out loss" in last


@pytest.mark.parametrize(
    ("stage", "kl", "text"),
    [
        ("distill", 1.25, "distill  task 5.500  kl 1.250  12,346 tokens/s"),
        ("task", None, "task alone  task 5.500  12,346 tokens/s"),
    ],
)
def test_the_bar_says_it_in_80_columns(stage: Any, kl: float | None, text: str) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    record = StepRecord(12345, 8.0, 5.5, 0.01, 0.0, 1e-3, 1.0, 12345.6, {}, kl=kl, stage=stage)
    with TrainingDisplay(screen, 0, 20000, 10) as display:
        display.step(record)
    assert f" {text} " in screen.file.getvalue()


def test_the_end_of_the_run_is_no_ending_of_the_teacher(data: TextData, tmp_path: Path) -> None:
    assert not any("silent" in line for line in lines(tmp_path, data, steps=3, distill=Distill()))


def test_a_divergence_that_is_not_a_number_is_named(data: TextData, tmp_path: Path) -> None:
    teacher = tiny_teacher()
    with torch.no_grad():
        teacher.embedding[7] = math.nan
    with pytest.raises(TrainError, match="kl nan"):
        taught(TinyProgram(), data, tmp_path / "run", teacher=teacher).run()


# after it fell silent


def test_a_silent_teacher_is_neither_asked_nor_held(
    data: TextData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tiny_teacher()
    program.register_module("parent", Ring(program))  # as modules often are: held by a ring of references
    teacher = NotingTeacher(program, STAGED)
    alive = weakref.ref(teacher), weakref.ref(program), weakref.ref(program.up)
    asked, gone = teacher.asked, list[list[bool]]()
    run = taught(TinyProgram(), data, tmp_path, teacher=teacher, accumulate=2)
    take = run._stepper.take

    def look_and_take(*args: Any) -> Any:
        gone.append([one() is None for one in alive])
        return take(*args)

    monkeypatch.setattr(run._stepper, "take", look_and_take)
    gc.disable()  # whoever lets it go sees to its memory
    try:
        del teacher, program
        run.run()
    finally:
        gc.enable()
    assert gone == [[False] * 3] * 5 + [[True] * 3] * 5
    # twice a step, each time about two sequences: the first 20 of the run, and no others
    assert asked == [(position, 2) for position in range(0, 20, 2)]


class Ring(torch.nn.Module):
    """Knows the module that it is a part of."""

    def __init__(self, parent: torch.nn.Module) -> None:
        super().__init__()
        self.__dict__["_parent"] = parent


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_after_the_stop_steps_are_plain_ones(data: TextData, tmp_path: Path, dtype: str) -> None:
    """To the bit those of a program that never knew a teacher, from the checkpoint of the switch on."""
    layer = LayerSettings(experts=3, top_k=2, balance="bias", bias_rate=0.01)
    student = TinyProgram(dropout=0.2, settings=layer)
    changes: dict[str, Any] = {"dtype": dtype, "accumulate": 2, "save_every": 5}
    run = taught(student, data, tmp_path, **changes)
    told = run.run()

    plain = TinyProgram(dropout=0.2, settings=layer, seed=3)
    stepper = OptimizerStep(plain, run.settings)
    restore_snapshot(tmp_path / "step-00000005", plain, stepper.optimizer, stepper.holding)
    restore_random(tmp_path / "step-00000005", stepper.holding)
    plain.train()
    for record in told.history[5:]:
        batch = data.train_batch(0, 4 * (record.step - 1), 4)
        loss, norm = stepper.take(batch, learning_rate(record.step - 1, run.settings))
        assert (loss.loss, loss.task, loss.kl, norm) == (record.loss, record.task, None, record.grad_norm)
    assert_equal_states(state(student), state(plain))


# a teacher that says nothing that counts


class Drawing(TinyProgram):
    """Draws random numbers even in eval mode."""

    def run(self, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        torch.rand(3)
        return super().run(tokens)


def test_with_alpha_zero_weights_are_those_of_a_plain_run(data: TextData, tmp_path: Path) -> None:
    """Students draw their dropout as without a teacher, and nothing is added to any gradient."""
    alone, heard = (TinyProgram(dropout=0.3) for _ in range(2))
    expected = Trainer(alone, tiny_settings(), data, tmp_path / "plain", console=QUIET).run()
    distill = Distill(alpha=0.0, stop=0.8)
    teacher = Drawing(seed=5, dropout=0.5)
    teacher.load_state_dict({name: 4.0 * value for name, value in teacher.state_dict().items()})
    found = taught(heard, data, tmp_path / "heard", distill=distill, teacher=teacher).run()
    assert_equal_states(state(heard), state(alone))
    assert [record.loss for record in found.history] == [record.loss for record in expected.history]
    kl = [record.kl for record in found.history]
    assert kl[8:] == [None, None]
    assert all(value is not None and value > 0.01 for value in kl[:8])  # it is measured all the same


@pytest.mark.parametrize("distill", [Distill(stop=0.0), Distill(stop_step=0), Distill(stop=0.04)])
def test_a_teacher_that_never_speaks_is_never_opened(
    data: TextData, tmp_path: Path, distill: Distill
) -> None:
    def forbidden() -> LiveTeacher:
        raise AssertionError("it was opened")

    alone, student = TinyProgram(), TinyProgram()
    Trainer(alone, tiny_settings(), data, tmp_path / "plain", console=QUIET).run()
    told = taught(student, data, tmp_path / "run", distill=distill, teacher=LateTeacher(forbidden, {})).run()
    assert told.silent is not None
    assert told.silent.step == 0
    assert {record.stage for record in told.history} == {"task"}
    assert_equal_states(state(student), state(alone))


# the teacher stays what it is


def test_teaching_changes_nothing_of_the_teacher(data: TextData, tmp_path: Path) -> None:
    teacher = tiny_teacher(dropout=0.5)  # in train mode
    teacher.up.requires_grad_(False)
    before = state(teacher)
    speaker = NotingTeacher(teacher, STAGED)
    taught(TinyProgram(), data, tmp_path, teacher=speaker).run()
    assert_equal_states(state(teacher), before)
    assert teacher.training
    assert [name for name, value in teacher.named_parameters() if not value.requires_grad] == ["up"]
    assert all(value.grad is None for value in teacher.parameters())
    lessons = speaker.said
    assert len(lessons) == 5
    assert not any(said.told.requires_grad for said in lessons)
    # in eval mode: without its dropout
    expected = teacher.eval()(data.train_batch(0, 0, 4)[0])
    assert torch.equal(lessons[0].told, expected)


def test_a_bf16_teacher_says_nearly_the_same(data: TextData, tmp_path: Path) -> None:
    kl, kinds = {}, {}
    for dtype in ("fp32", "bf16"):
        distill = STAGED.model_copy(update={"dtype": dtype})
        teacher = LiveTeacher(tiny_teacher(), distill)
        kinds[dtype] = teacher.lesson(data.train_batch(0, 0, 4), 0).told.dtype
        told = taught(TinyProgram(), data, tmp_path / dtype, distill=distill, teacher=teacher).run()
        kl[dtype] = [record.kl for record in told.history[:5]]
    assert kinds == {"fp32": torch.float32, "bf16": torch.bfloat16}
    assert kl["bf16"] == pytest.approx(kl["fp32"], rel=0.02)
    assert kl["bf16"] != kl["fp32"]


# what does not fit


def test_a_teacher_with_the_students_weights_is_refused(data: TextData, tmp_path: Path) -> None:
    student = TinyProgram()
    with pytest.raises(TrainError, match="its embedding is the student's embedding") as caught:
        taught(student, data, tmp_path / "run", teacher=student).run()
    assert "copy.deepcopy" in caught.value.nearest

    class Behind:
        """Hands the lessons of another on."""

        def __init__(self, teacher: LiveTeacher) -> None:
            self.program, self.lesson, self.identity = teacher.program, teacher.lesson, teacher.identity

    tied = tiny_teacher()
    tied.down = student.down
    with pytest.raises(TrainError, match="its down is the student's down"):
        taught(student, data, tmp_path / "run", teacher=Behind(LiveTeacher(tied, STAGED))).run()

    nudged = LayerSettings(experts=3, top_k=2, balance="bias")
    student, twin = TinyProgram(settings=nudged), tiny_teacher()
    twin.bias = student.bias
    with pytest.raises(TrainError, match=f"its bias is the student's {LAYER}"):
        taught(student, data, tmp_path / "run", teacher=twin).run()
    assert not (tmp_path / "run").exists()


def test_a_teaching_for_other_steps_is_refused(data: TextData, tmp_path: Path) -> None:
    teaching = Teaching(LiveTeacher(tiny_teacher(), STAGED), STAGED, 20)
    with pytest.raises(TrainError, match="a Teaching for 20 steps, and steps = 10"):
        Trainer(TinyProgram(), tiny_settings(), data, tmp_path / "run", teaching=teaching)


@pytest.mark.parametrize("every", [0, 10, 11])
def test_patience_without_evaluations_is_refused(data: TextData, tmp_path: Path, every: int) -> None:
    with pytest.raises(PlanError, match=f"patience = 2 with eval_every = {every} in 10 steps") as caught:
        taught(TinyProgram(), data, tmp_path, distill=Distill(patience=2), eval_every=every)
    assert caught.value.where == "distill.patience"


def test_a_teacher_that_was_let_go_is_missed(data: TextData, tmp_path: Path) -> None:
    run = taught(TinyProgram(), data, tmp_path, save_every=3, keep=9)
    run.run()
    for name in ("step-00000006", "step-00000009", "step-00000010"):
        shutil.rmtree(tmp_path / name)
    weights = load_checkpoint(tmp_path / "step-00000003").tensors["parameters"]
    with pytest.raises(TrainError, match="let go"):
        run.run(resume=True)
    assert not torch.equal(run.program.up, weights["up"])  # refused before anything changed


def test_one_that_is_opened_again_is_not(data: TextData, tmp_path: Path) -> None:
    opened: list[Tensor] = []

    def open_teacher() -> LiveTeacher:
        torch.rand(3)  # what opening draws is nobody's business
        teacher = LiveTeacher(tiny_teacher(), STAGED)
        opened.append(teacher.program.up)
        return teacher

    students = [TinyProgram(dropout=0.2) for _ in range(2)]
    taught(students[0], data, tmp_path / "whole").run()
    run = taught(students[1], data, tmp_path / "run", teacher=LateTeacher(open_teacher, {"files": "a"}))
    run.run(stop_at=2)
    run.run(resume=True, stop_at=3)
    assert len(opened) == 1  # it is still there
    run.run(resume=True)
    shutil.rmtree(tmp_path / "run/step-00000010")  # back to step 3
    run.run(resume=True)
    assert len(opened) == 2
    assert_equal_states(state(students[1]), state(students[0]))
