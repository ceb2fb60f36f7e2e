"""A run with a teacher that was stopped or killed, in any stage, goes on to the bit; and when it may not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import moec.runtime.train as train_module
from moec.errors import ArtifactError
from moec.plan import Distill
from moec.runtime.checkpoint import list_checkpoints, load_checkpoint
from moec.runtime.data import TextData
from moec.runtime.distillation.stages import Ending
from moec.runtime.distillation.teacher import LiveTeacher
from moec.runtime.distillation.teaching import LateTeacher
from moec.runtime.evaluate import Evaluation
from moec.runtime.records import read_records
from moec.runtime.train import Trainer
from tests.runtime.tiny import TinyProgram, tiny_settings, tiny_text
from tests.runtime.tiny_teaching import QUIET, STAGED, assert_equal_states, state, taught, tiny_teacher


@pytest.fixture
def data(tmp_path: Path) -> TextData:
    return tiny_text(tmp_path)


def late(opened: list[int], distill: Distill = STAGED) -> LateTeacher:
    """A teacher that notes when it is opened."""

    def open_teacher() -> LiveTeacher:
        opened.append(1)
        return LiveTeacher(tiny_teacher(dropout=0.1), distill)

    return LateTeacher(open_teacher, {"files": "those of the teacher"})


# stopped


@pytest.mark.parametrize(
    ("stop_at", "dtype"),
    [(2, "fp32"), (2, "bf16"), (5, "fp32"), (7, "fp32")],
    ids=["distill", "distill in bf16", "at the switch", "task"],
)
def test_resuming_continues_bit_for_bit(data: TextData, tmp_path: Path, stop_at: int, dtype: str) -> None:
    changes: dict[str, Any] = {"accumulate": 2, "eval_every": 3, "save_every": 4, "dtype": dtype}
    whole = TinyProgram(dropout=0.2)
    expected = taught(whole, data, tmp_path / "whole", teacher=late([]), **changes).run()
    student = TinyProgram(dropout=0.2)
    first = taught(student, data, tmp_path / "parts", teacher=late([]), **changes).run(stop_at=stop_at)

    resumed, opened = TinyProgram(dropout=0.2, seed=9), list[int]()
    torch.manual_seed(77)
    second = taught(resumed, data, tmp_path / "parts", teacher=late(opened), **changes).run(resume=True)
    assert len(opened) == (stop_at < 5)  # after the switch nobody needs it
    assert_equal_states(state(resumed), state(whole))
    found = [(step.loss, step.kl, step.stage) for step in first.history + second.history]
    assert found == [(step.loss, step.kl, step.stage) for step in expected.history]
    assert second.silent == expected.silent == Ending(5, "stop = 0.5")
    saved = [load_checkpoint(tmp_path / folder / "step-00000010") for folder in ("whole", "parts")]
    for stem in saved[0].tensors:
        assert_equal_states(dict(saved[0].tensors[stem]), dict(saved[1].tensors[stem]))
    assert saved[0].record == saved[1].record


def test_a_checkpoint_holds_nothing_of_the_teacher_but_its_name(data: TextData, tmp_path: Path) -> None:
    student = TinyProgram()
    told = taught(student, data, tmp_path, steps=2).run()
    assert told.checkpoint is not None
    saved = load_checkpoint(told.checkpoint)
    names = [name for group in saved.tensors.values() for name in group]
    sizes = dict(student.named_parameters()).keys()
    assert saved.tensors["parameters"].keys() == sizes
    assert len(names) == len(set(names))
    assert saved.record["teacher"].keys() == {"program", "weights"}
    assert saved.record["distill"]["alpha"] == 2.0
    assert saved.record["stages"] == {"last": 1, "setting": "stop", "lowest": None, "waited": 0}


# patience

LOSSES = {2: 3.0, 4: 3.5, 6: 2.9, 8: 3.0, 10: 2.95, 12: 2.94, 14: 1.0, 16: 1.0}
PATIENT = Distill(patience=3, stop=0.9)


def told_losses(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    """Evaluations of `run` find `LOSSES`, and a very low one where none is due."""

    def evaluation(*args: Any, **options: Any) -> Evaluation:
        return Evaluation(LOSSES.get(run[0].step, 0.001), 1, {}, {})

    monkeypatch.setattr(train_module, "evaluate", evaluation)


@pytest.mark.parametrize("stop_at", [1, 5, 6, 7, 10, 11, 12, 13])
def test_patience_survives_a_stop_anywhere(
    data: TextData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    """Evaluations that are not due, at the end of a call of `run`, do not count."""
    changes: dict[str, Any] = {"steps": 16, "eval_every": 2, "distill": PATIENT, "save_every": 2, "batch": 2}
    running: list[Trainer] = []
    told_losses(monkeypatch, running)
    running[:] = [taught(TinyProgram(), data, tmp_path, teacher=late([], PATIENT), **changes)]
    first = running[0].run(stop_at=stop_at)
    opened: list[int] = []
    running[:] = [taught(TinyProgram(), data, tmp_path, teacher=late(opened, PATIENT), **changes)]
    second = running[0].run(resume=True)
    stages = [record.stage for record in first.history + second.history]
    assert stages == ["distill"] * 12 + ["task"] * 4
    assert second.silent == Ending(12, "patience = 3")
    assert first.silent == (Ending(12, "patience = 3") if stop_at >= 12 else None)
    assert bool(opened) == (stop_at < 12)


def test_an_evaluation_is_part_of_the_checkpoint_of_its_step(
    data: TextData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill right after a checkpoint was written loses no evaluation that counted."""
    running: list[Trainer] = []
    told_losses(monkeypatch, running)
    changes: dict[str, Any] = {"steps": 16, "eval_every": 4, "distill": PATIENT, "save_every": 4, "keep": 9}
    running[:] = [taught(TinyProgram(), data, tmp_path, **changes)]
    running[0].run()
    stages = {path.name: load_checkpoint(path).record["stages"] for path in list_checkpoints(tmp_path)}
    waited = {int(name.removeprefix("step-")): kept["waited"] for name, kept in stages.items()}
    assert waited == {4: 0, 8: 0, 12: 0, 16: 0}
    assert [kept["lowest"] for kept in stages.values()] == [3.5, 3.0, 2.94, 2.94]


# killed

# Trains with a teacher in a child that kills itself (SIGKILL: nothing is cleaned up) while it computes the
# n-th loss of a step, then goes on in a new child, which is killed in turn: for the places given.
KILLED_WHILE_LEARNING = """
import os, pathlib, signal, sys
import torch
from moec.runtime.checkpoint import latest_checkpoint
from moec.plan import Distill
from tests.runtime.test_distillation_resume import late
from tests.runtime.tiny import TinyProgram, tiny_text
from tests.runtime.tiny_teaching import taught
torch.set_num_threads(1)
root = pathlib.Path(sys.argv[1])
data = tiny_text(root)

class Dying(TinyProgram):
    def loss_terms(self, *args, **kwargs):
        self.left -= self.training
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss_terms(*args, **kwargs)

class Told(list):
    def append(self, value):
        print("opened", flush=True)

def learn(left):
    student, distill = Dying(dropout=0.2), Distill(stop=0.6, patience=4)
    student.left = left
    how = {"accumulate": 2, "save_every": 2, "eval_every": 2, "distill": distill}
    run = taught(student, data, root / "run", teacher=late(Told(), distill), **how)
    run.run(resume=latest_checkpoint(root / "run") is not None)

for left in map(int, sys.argv[2:]):
    child = os.fork()
    if child == 0:
        learn(left)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    latest = latest_checkpoint(root / "run")
    print(os.WIFSIGNALED(status), latest and latest.name, flush=True)
"""


def test_a_process_killed_in_each_stage_goes_on_to_the_bit(data: TextData, tmp_path: Path) -> None:
    whole, distill = TinyProgram(dropout=0.2), Distill(stop=0.6, patience=4)
    changes: dict[str, Any] = {"accumulate": 2, "save_every": 2, "eval_every": 2, "distill": distill}
    expected = taught(whole, data, tmp_path / "whole", teacher=late([], distill), **changes).run()
    # before any checkpoint; while the teacher speaks, twice; after the checkpoint of the switch; later
    places = ["2", "6", "6", "5", "5", "99"]
    command = [sys.executable, "-c", KILLED_WHILE_LEARNING, str(tmp_path), *places]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "opened", "True None", "opened", "True step-00000002", "opened", "True step-00000004",
        "opened", "True step-00000006", "True step-00000008", "False step-00000010",
    ]  # fmt: skip
    saved = load_checkpoint(tmp_path / "run/step-00000010")
    assert_equal_states(dict(saved.tensors["parameters"]), dict(whole.named_parameters()))
    rows = [row for row in read_records(tmp_path / "run/train.jsonl") if row["kind"] == "step"]
    found = [(row["step"], row["loss"], row.get("kl"), row["stage"]) for row in rows]
    assert found == [(step.step, step.loss, step.kl, step.stage) for step in expected.history]


# another run


def changed_distill(**changes: object) -> Distill:
    return Distill.model_validate({**STAGED.model_dump(exclude_unset=True), **changes})


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"alpha": 1.0}, "distill.alpha"),
        ({"temperature": 2.0}, "distill.temperature"),
        ({"direction": "reverse"}, "distill.direction"),
        ({"stop": 0.7}, "distill.stop"),
        ({"patience": 2}, "distill.patience"),
        ({"dtype": "bf16"}, "distill.dtype"),
    ],
)
def test_other_settings_are_another_run(
    data: TextData, tmp_path: Path, changes: dict[str, object], what: str
) -> None:
    taught(TinyProgram(), data, tmp_path / "run").run(stop_at=2)
    student = TinyProgram(seed=4)
    before = state(student)
    changed = taught(student, data, tmp_path / "run", distill=changed_distill(**changes), eval_every=5)
    with pytest.raises(ArtifactError) as caught:
        changed.run(resume=True)
    error, name = caught.value, what.removeprefix("distill.")
    assert error.where == f"{tmp_path / 'run/step-00000002'} (distill)"
    assert error.found == f"{what} {getattr(STAGED, name)}"
    assert error.needed == f"{what} {changes[name]}, that of this run"
    assert_equal_states(state(student), before)


def test_another_teacher_is_another_run(data: TextData, tmp_path: Path) -> None:
    taught(TinyProgram(), data, tmp_path / "run").run(stop_at=2)
    with pytest.raises(ArtifactError, match=r"teacher\.weights"):
        taught(TinyProgram(), data, tmp_path / "run", teacher=tiny_teacher(seed=6)).run(resume=True)
    with pytest.raises(ArtifactError, match=r"teacher\.program tiny"):
        taught(TinyProgram(), data, tmp_path / "run", teacher=tiny_teacher(dropout=0.5)).run(resume=True)
    nudged = tiny_teacher()
    nudged.bias[1] = 1e-3
    with pytest.raises(ArtifactError, match=r"teacher\.weights"):
        taught(TinyProgram(), data, tmp_path / "run", teacher=nudged).run(resume=True)
    told = taught(TinyProgram(), data, tmp_path / "run", teacher=tiny_teacher()).run(resume=True)
    assert told.step == 10


@pytest.mark.parametrize("stop_at", [2, 7])
def test_a_run_keeps_its_teacher_or_never_had_one(data: TextData, tmp_path: Path, stop_at: int) -> None:
    taught(TinyProgram(), data, tmp_path / "taught").run(stop_at=stop_at)
    with pytest.raises(ArtifactError, match="a run with a teacher"):
        Trainer(TinyProgram(), tiny_settings(), data, tmp_path / "taught", console=QUIET).run(resume=True)
    Trainer(TinyProgram(), tiny_settings(), data, tmp_path / "plain", console=QUIET).run(stop_at=stop_at)
    with pytest.raises(ArtifactError, match="a run without a teacher"):
        taught(TinyProgram(), data, tmp_path / "plain").run(resume=True)


# longer and shorter


@pytest.mark.parametrize(
    ("stop_at", "steps", "stages"),
    [
        (4, 20, "dddddddddd" "tttttttttt"),  # still spoke: half of the longer run
        (5, 20, "dddddddddd" "tttttttttt"),  # had just said its last
        (7, 20, "ddddd" "ttttttttttttttt"),  # was silent already, and stays so
        (4, 6, "dddd" "tt"),  # of the shorter run, half is over
    ],
)  # fmt: skip
def test_a_run_of_another_length(
    data: TextData, tmp_path: Path, stop_at: int, steps: int, stages: str
) -> None:
    first = taught(TinyProgram(), data, tmp_path, batch=2).run(stop_at=stop_at)
    opened: list[int] = []
    teacher = LateTeacher(late(opened).open, LiveTeacher(tiny_teacher(), STAGED).identity())
    second = taught(TinyProgram(), data, tmp_path, steps=steps, teacher=teacher, batch=2).run(resume=True)
    told = [str(record.stage)[0] for record in first.history + second.history]
    assert "".join(told) == stages
    assert second.silent == Ending(stages.count("d"), "stop = 0.5")
    assert bool(opened) == ("d" in stages[stop_at:])
