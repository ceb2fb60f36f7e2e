"""`moec distill` on two local ranks: what one process learns, lost ranks, runs that go on.

The teacher is trained by one process, and lies on the ranks as its own plan says.
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

import moec
from tests.distributed.jobs import GPT, TRAINING, Job, curve, told, write_plan

STUDENT = """
[student]
depth = 3
[distill]
temperature = 2.0
stop = 0.5
[parallel]
{parallel}
"""


def write_student(folder: Path, *, steps: int = 10, parallel: str = "tensor = 2") -> None:
    (folder / "student.toml").write_text((STUDENT + TRAINING).format(steps=steps, parallel=parallel))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program of four layers, every other one with experts; tests read it and leave it alone."""
    folder = tmp_path_factory.mktemp("teacher")
    write_plan(folder, steps=10)
    with Job(folder, "--lr", 0.1, model=f"{GPT}?layers=4&dropout=0.0") as job:
        job.succeed()
    return job.run / "program"


def distilling(folder: Path, teacher: Path, *words: object) -> Job:
    return Job(folder, "--plan", "student.toml", *words, model=str(teacher), command="distill")


def test_two_ranks_learn_what_one_process_learns(teacher: Path, tmp_path: Path) -> None:
    """The teacher on a mesh of experts, its student on one of tensor ranks; and without the teacher, when it
    has said its last."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_student(tmp_path / name)
    with distilling(tmp_path / "one", teacher) as one:
        one.succeed()
    with distilling(tmp_path / "two", teacher, "--nproc", 2) as two:
        out = two.succeed()
    assert out.count("the teacher is silent after step 5") == 1, "rank 0 speaks, and nobody else"
    assert "moec generate run/program" in out
    curves = curve(one.run), curve(two.run)
    assert [row["stage"] for row in curves[1]] == ["distill"] * 5 + ["task"] * 5
    for ours, theirs in zip(*curves, strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5)
    said = [[row["kl"] for row in rows if "kl" in row] for rows in curves]
    assert len(said[0]) == 5
    assert min(said[0]) > 1e-3, "the teacher has something to say"
    assert said[1] == pytest.approx(said[0], rel=1e-3)
    parameters = [moec.load(run / "program").num_parameters() for run in (one.run, two.run)]
    assert parameters[0] == parameters[1]


@pytest.mark.nightly
@pytest.mark.parametrize("step", [3, 7])
def test_a_lost_rank_is_started_again_and_nothing_shows(step: int, teacher: Path, tmp_path: Path) -> None:
    """While the teacher speaks, and after it. Reason to be nightly: five starts."""
    for name in ("undisturbed", "disturbed"):
        (tmp_path / name).mkdir()
        write_student(tmp_path / name, steps=60)
    words = ("--nproc", 2, "--stop", 0.4)
    with distilling(tmp_path / "undisturbed", teacher, *words) as undisturbed:
        undisturbed.succeed()
    with distilling(tmp_path / "disturbed", teacher, *words, "--max-restarts", 1) as job:
        job.reach(4 * step)
        os.kill(job.ranks()[1], signal.SIGKILL)
        status, _, err = job.end()
    assert status == 0, err
    assert "rank 1 ended by SIGKILL; starting again (1 of 1)" in err
    assert "Traceback" not in err
    assert curve(job.run) == curve(undisturbed.run)


@pytest.mark.nightly
def test_a_run_of_ranks_goes_on_in_one_process(teacher: Path, tmp_path: Path) -> None:
    """Another mesh, and lessons from disk. Reason to be nightly: three starts."""
    write_student(tmp_path)
    plan = tmp_path / "student.toml"
    plan.write_text(plan.read_text().replace("stop = 0.5", "stop = 0.8\ntop_k = 16"))
    with distilling(tmp_path, teacher, "--nproc", 2, "--lessons", "lessons") as job:
        job.succeed()
    rows = curve(job.run)
    shutil.rmtree(job.run / "step-00000010")
    with distilling(tmp_path, teacher, "--resume", "--lessons", "lessons") as again:
        again.succeed()
    for ours, theirs in zip(curve(again.run), rows, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


@pytest.mark.nightly
def test_a_mistake_is_told_once(teacher: Path, tmp_path: Path) -> None:
    """Weights that were edited: every rank meets them. Reason to be nightly: a start of ranks."""
    edited = tmp_path / "edited"
    shutil.copytree(teacher, edited)
    for weights in edited.rglob("*.safetensors"):
        weights.write_bytes(b"\0" * weights.stat().st_size)
    write_student(tmp_path)
    with distilling(tmp_path, edited, "--nproc", 2) as job:
        status, out, err = job.end()
    assert status == 2, out + err
    assert [line.split()[0] for line in told(err)[1:3]] == ["found", "needed"], err
    assert "it was edited after saving" in err
    assert err.count("found") == 1
