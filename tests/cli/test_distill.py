"""`moec distill`: a student of a trained teacher, and all that can be wrong with that."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import moec
from moec.commands.distill import Called
from moec.runtime.records import read_records
from tests.cli.conftest import GPT, Moec

Refused = Callable[..., str]

TRAIN = "[train]\nsteps = 6\nbatch = 2\nsequence = 12\neval_batches = 1\nsave_every = 1\nkeep = 9"
TRAIN += '\nlog_every = 1\n[compile]\nverify = "off"\n'
STUDENT = "[student]\ndepth = 2\n"
DISTILL = "[distill]\ntemperature = 2.0\nstop = 0.5\n"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text to train on; tests read it and leave it alone."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("abc abd abe " * 100)
    return path


@pytest.fixture(scope="module")
def teacher(moec_: Moec, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained program of three layers, the outer ones with experts; tests read it and leave it alone."""
    folder = tmp_path_factory.mktemp("teacher")
    plan = folder / "moe.toml"
    plan.write_text('[moe]\nlayers = "0::2"\nexperts = 4\nresidual = "learned"\n' + TRAIN)
    words = ("--steps", 3, "--lr", "0.1", "--out", folder / "run")
    moec_("train", f"{GPT}?layers=3", "--plan", plan, "--data", text, *words)
    return folder / "run" / "program"


@pytest.fixture(scope="module")
def mos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of two layers, taught for half of six steps."""
    path = tmp_path_factory.mktemp("plans") / "mos.toml"
    path.write_text(STUDENT + DISTILL + TRAIN)
    return path


@pytest.fixture(scope="module")
def taught(
    moec_: Moec, teacher: Path, mos: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A whole run; tests read it and leave it alone."""
    run = tmp_path_factory.mktemp("taught") / "run"
    out = moec_("distill", teacher, "--plan", mos, "--data", text, "--out", run).stdout
    run.with_name("out.txt").write_text(out)
    return run


@pytest.fixture
def hidden_weights(teacher: Path) -> Iterator[Path]:
    """The teacher, whose weights nobody can read: what is refused now is refused before they are needed."""
    weights = teacher / "weights.safetensors"
    kept = weights.with_name("kept")
    weights.rename(kept)
    weights.write_bytes(b"\0" * kept.stat().st_size)
    yield teacher
    kept.replace(weights)


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return dict(moec.load(run / "program").state_dict())


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = weights_of(one), weights_of(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# what it does


def test_a_student_is_taught_saved_and_compared(taught: Path, teacher: Path, text: Path) -> None:
    out = taught.with_name("out.txt").read_text()
    assert "the teacher is silent after step 3 (stop = 0.5)" in out
    told = (line.split() for line in out.splitlines() if line.startswith(("teacher ", "student ")))
    rows = {who: facts for who, *facts in told}
    programs = {"teacher": moec.load(teacher), "student": moec.load(taught / "program")}
    for who, program in programs.items():
        assert rows[who][:2] == [f"{program.num_parameters(active=a):,}" for a in (False, True)]
    assert float(rows["student"][2]) > 0
    assert f"moec generate {taught}/program --prompt The" in out
    assert programs["student"].plan.student.depth == 2  # the plan as it was written
    assert not programs["student"].training


def test_the_teacher_stays_and_the_student_moves(taught: Path, teacher: Path) -> None:
    began, ended = moec.load(taught / "student"), moec.load(taught / "program")
    first = moec.load(teacher).student({"student": {"keep": [0, 2]}}, verify="off")
    before = began.state_dict()
    assert all(torch.equal(before[name], value) for name, value in first.state_dict().items())
    after = ended.state_dict()
    moved = [name for name, value in before.items() if not torch.equal(value, after[name])]
    assert "token_embedding.weight" in moved


def test_records_tell_the_stages(taught: Path) -> None:
    steps = [row for row in read_records(taught / "train.jsonl") if row["kind"] == "step"]
    assert [row["stage"] for row in steps] == ["distill"] * 3 + ["task"] * 3
    assert [("kl" in row, row.get("temperature")) for row in steps] == [(True, 2.0)] * 3 + [(False, None)] * 3


def test_the_student_writes(taught: Path, moec_: Moec) -> None:
    assert moec_("generate", taught / "program", "--prompt", "ab", "-n", 4).stdout.startswith("ab")


@pytest.mark.parametrize("step", [1, 3, 5])
def test_killed_in_any_stage_it_goes_on_to_the_bit(
    step: int, taught: Path, teacher: Path, mos: Path, text: Path, tmp_path: Path, moec_: Moec
) -> None:
    """With a teacher that speaks, at the switch, and after it, when nobody needs the teacher."""
    run = stopped_at(step, taught, tmp_path / "run")
    name = teacher if step < 3 else tmp_path / "gone"
    out = moec_("distill", name, "--plan", mos, "--data", text, "--out", run, "--resume").stdout
    assert same_weights(taught, run)
    whole, again = (read_records(folder / "train.jsonl") for folder in (taught, run))
    assert [row.get("loss") for row in again] == [row.get("loss") for row in whole]
    assert "teacher " in out  # what was known of it at the start


def stopped_at(step: int, run: Path, copy: Path) -> Path:
    """What `run` would have left, had it been killed after `step` steps."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "program")
    for folder in copy.glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    return copy


def test_the_plan_need_not_be_named_again(
    taught: Path, teacher: Path, text: Path, tmp_path: Path, moec_: Moec
) -> None:
    run = stopped_at(4, taught, tmp_path / "run")
    moec_("distill", teacher, "--data", text, "--out", run, "--resume")
    assert same_weights(taught, run)


def test_a_run_that_is_over_says_so_again(
    taught: Path, teacher: Path, text: Path, tmp_path: Path, moec_: Moec
) -> None:
    run = stopped_at(6, taught, tmp_path / "run")
    out = moec_("distill", teacher, "--data", text, "--out", run, "--resume").stdout
    assert "6 steps" in out
    assert same_weights(taught, run)


def test_what_is_typed_comes_before_the_plan(
    teacher: Path, mos: Path, text: Path, tmp_path: Path, moec_: Moec
) -> None:
    words = ("--alpha", 0.5, "--temperature", 3, "--stop", 1, "--steps", 2, "--seed", 4, "--json")
    told = json.loads(
        moec_("distill", teacher, "--plan", mos, "--data", text, "--out", tmp_path, *words).stdout
    )
    assert told["silent"] is None
    assert told["teacher"]["held_out_loss"] > 0
    assert told["student"]["parameters"] < told["teacher"]["parameters"]
    (first, *_) = read_records(tmp_path / "train.jsonl")
    assert (first["alpha"], first["temperature"], first["stage"]) == (0.5, 3.0, "distill")


@pytest.mark.parametrize("own", [False, True], ids=["cut", "own"])
def test_sequences_fit_both_where_nobody_says_how_long(
    own: bool, teacher: Path, text: Path, tmp_path: Path, moec_: Moec
) -> None:
    """Of 16 positions, not the 256 that are the default; run and student say so, and it goes on."""
    run, plan = tmp_path / "run", tmp_path / "plan.toml"
    plan.write_text(f'{"" if own else STUDENT}[compile]\nverify = "off"\n')
    student = ("--student", f"{GPT}?layers=1") if own else ()
    words = ("--data", text, "--steps", 2, "--batch", 2, "--out", run)
    moec_("distill", teacher, "--plan", plan, *student, *words)
    (record,) = run.glob("step-*/*.json")
    assert json.loads(record.read_text())["record"]["settings"]["sequence"] == 16
    assert moec.load(run / "program").plan.train.sequence == 16
    moec_("distill", teacher, *student, *words, "--resume")


def test_without_a_distill_table_its_defaults_are_said(
    teacher: Path, text: Path, tmp_path: Path, moec_: Moec
) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(STUDENT + TRAIN)
    words = ("--plan", plan, "--data", text, "--steps", 1, "--out", tmp_path / "run")
    out = moec_("distill", teacher, *words).stdout
    assert "no [distill] in the plan: alpha 1, temperature 1, stop 1" in out


@pytest.mark.parametrize("kind", ["model", "saved"])
def test_a_student_of_ones_own(
    kind: str, teacher: Path, taught: Path, text: Path, tmp_path: Path, moec_: Moec
) -> None:
    plan, run = tmp_path / "plan.toml", tmp_path / "run"
    plan.write_text(DISTILL + TRAIN)
    student = f"{GPT}?layers=1" if kind == "model" else taught / "student"
    words = ("--student", student, "--plan", plan, "--data", text, "--steps", 2, "--out", run)
    told = json.loads(moec_("distill", teacher, *words, "--json").stdout)
    saved = moec.load(run / "program")
    assert told["student"]["parameters"] == saved.num_parameters()
    shutil.rmtree(run / "step-00000002")
    moec_("distill", teacher, *words, "--resume")
    assert all(torch.equal(value, saved.state_dict()[n]) for n, value in weights_of(run).items())


def test_layers_by_importance(teacher: Path, text: Path, tmp_path: Path, moec_: Moec) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(STUDENT + 'by = "importance"\n' + TRAIN)
    words = ("--plan", plan, "--data", text, "--steps", 1, "--out", tmp_path / "run")
    moec_("distill", teacher, *words)
    student = moec.load(tmp_path / "run" / "student")
    assert len({origin.teacher for origin in student.origins.values()} - {None}) > 0


def test_lessons_are_kept_and_serve_other_runs(
    teacher: Path, text: Path, tmp_path: Path, moec_: Moec, refused: Refused
) -> None:
    """From disk a student learns what it learns live, to the bit, and goes on without the teacher."""
    plan, lessons = tmp_path / "plan.toml", tmp_path / "lessons"
    plan.write_text(STUDENT + DISTILL + "top_k = 8\n" + TRAIN)
    words = ("--plan", plan, "--data", text, "--steps", 4, "--stop", 1)
    for name, more in {"live": (), "stored": ("--lessons", lessons), "again": ("--lessons", lessons)}.items():
        out = moec_("distill", teacher, *words, "--out", tmp_path / name, *more).stdout
        assert ("samples stored" in out) == (name == "stored")
    run = stopped_at(2, tmp_path / "stored", tmp_path / "halves")
    moec_("distill", tmp_path / "gone", *words, "--lessons", lessons, "--out", run, "--resume")
    for name in ("stored", "again", "halves"):
        assert same_weights(tmp_path / "live", tmp_path / name), name
    for other, line in {
        ("--seed", 5): "lessons with seed 0",
        ("--temperature", 3): "were stored with 2.0",
        ("--steps", 4, "--sequence", 8): "lessons with data",
    }.items():
        told = refused("distill", teacher, *words, "--lessons", lessons, "--out", tmp_path / "r", *other)
        assert line in told
    plan.write_text(STUDENT + DISTILL + "top_k = 9\n" + TRAIN)
    told = refused("distill", teacher, *words, "--lessons", lessons, "--out", tmp_path / "r")
    assert "nearest top_k = 8" in told
    assert not (tmp_path / "r").exists()


def test_nobody_holds_a_teacher_that_was_handed_over() -> None:
    opened: list[object] = []
    called = Called(lambda: _Opened(opened))  # type: ignore[arg-type, return-value]
    first = called.program()
    assert called.hand_over() is first
    assert called.program() is not first
    assert len(opened) == 2


class _Opened:
    """Something that is opened and put into eval mode."""

    def __init__(self, log: list[object]) -> None:
        log.append(self)

    def eval(self) -> _Opened:
        return self
