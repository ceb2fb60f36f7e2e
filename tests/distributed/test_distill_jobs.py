"""`moec distill` on two local ranks: a teacher on two data ranks, a student on two tensor ranks."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import moec
from tests.distributed.jobs import Job, curve, told
from tests.distributed.models import gpt

TEACHER: dict[str, Any] = {
    "moe": {"layers": "1::2", "experts": 4, "residual": "learned"},
    "parallel": {"expert": 2},
    "compile": {"verify": "off"},
}
PLAN = """
[student]
depth = 1
[distill]
alpha = 0.5
stop = 0.6
[parallel]
tensor = 2
timeout = 60
[compile]
verify = "off"
[train]
steps = 40
batch = 4
sequence = 12
eval_batches = 1
save_every = 5
log_every = 1
eval_every = 0
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program saved for two ranks, that has a mind of its own."""
    torch.manual_seed(5)
    model = gpt(dropout=0.0)
    for value in model.parameters():
        value.data.add_(0.3 * torch.randn_like(value))
    program = moec.compile(model, TEACHER, world=2)
    return program.save(tmp_path_factory.mktemp("teacher") / "program")


def distilling(folder: Path, teacher: Path, *words: object) -> Job:
    """The job in `folder`, with a copy of the teacher beside it."""
    if not (folder / "teacher").exists():
        shutil.copytree(teacher, folder / "teacher")
    (folder / "mos.toml").write_text(PLAN)
    return Job(folder, "--plan", "mos.toml", "--nproc", 2, *words, model="teacher", command="distill")


@pytest.fixture(scope="module")
def undisturbed(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of forty steps, 24 of them with the teacher; tests read it and leave it alone."""
    with distilling(tmp_path_factory.mktemp("undisturbed"), teacher) as job:
        out = job.succeed()
    assert out.count("the teacher is silent after step 24") == 1, "rank 0 speaks, and nobody else"
    return job.run


def test_a_rank_lost_under_the_teacher_comes_back_to_the_same_steps(teacher: Path, tmp_path: Path) -> None:
    with distilling(tmp_path, teacher, "--max-restarts", 1) as job:
        job.reach(8)
        before = curve(job.run)
        os.kill(job.ranks()[1], signal.SIGKILL)
        status, _, err = job.end()
    assert status == 0, err
    assert "rank 1 ended by SIGKILL; starting again (1 of 1)" in err
    assert "Traceback" not in err
    after = curve(job.run)
    assert after[: len(before)] == before, "steps after the checkpoint of step 5 were taken twice"
    assert [row["step"] for row in after] == list(range(1, 41))
    assert [row["step"] for row in after if "kl" in row] == list(range(1, 25))


@pytest.mark.nightly
@pytest.mark.parametrize("step", [13, 31], ids=["while it speaks", "when it is silent"])
def test_a_lost_rank_leaves_no_trace(step: int, undisturbed: Path, teacher: Path, tmp_path: Path) -> None:
    """Reason to be nightly: two jobs; what is left out above is the comparison with another one."""
    with distilling(tmp_path, teacher, "--max-restarts", 1) as job:
        job.reach(step)
        os.kill(job.ranks()[step % 2], signal.SIGKILL)
        status, _, err = job.end()
    assert status == 0, err
    assert curve(job.run) == curve(undisturbed)


@pytest.mark.nightly
def test_a_silent_teacher_may_be_gone(undisturbed: Path, teacher: Path, tmp_path: Path) -> None:
    """Reason to be nightly: two starts."""
    with distilling(tmp_path, teacher) as job:
        job.reach(30)
        job.process.send_signal(signal.SIGINT)
        assert job.end()[0] == 130
    shutil.rmtree(tmp_path / "teacher")
    (tmp_path / "teacher").mkdir()
    with distilling(tmp_path, teacher, "--resume") as job:
        job.succeed()
    assert curve(job.run) == curve(undisturbed)


@pytest.mark.nightly
def test_a_damaged_part_of_the_teacher_is_told_once(teacher: Path, tmp_path: Path) -> None:
    """Reason to be nightly: `test_jobs.py` has the same of the program that is trained."""
    shutil.copytree(teacher, tmp_path / "teacher")
    part = sorted((tmp_path / "teacher").rglob("expert_2-1.safetensors"))[0]
    part.write_bytes(part.read_bytes()[:-7])
    with distilling(tmp_path, teacher) as job:
        status, out, err = job.end()
    assert status == 2, out + err
    lines = told(err)
    assert part.name in lines[0], err
    assert len(lines) <= 4, err
