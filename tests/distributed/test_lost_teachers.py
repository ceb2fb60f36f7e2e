"""`moec distill` on two ranks that lose one another, or the teacher.

The teacher lies on two data ranks, the student on two tensor ranks.
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import moec
from tests.distributed.jobs import FAULTY, TRAINING, Job, curve, told
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
timeout = {timeout}
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


def distilling(folder: Path, teacher: Path, *words: object, timeout: int = 60, **how: Any) -> Job:
    """The job in `folder`, with a copy of the teacher beside it when it begins."""
    if "--resume" not in words and not (folder / "teacher").exists():
        shutil.copytree(teacher, folder / "teacher")
    (folder / "mos.toml").write_text((PLAN + TRAINING).format(steps=25, timeout=timeout))
    return Job(folder, "--plan", "mos.toml", *words, model="teacher", command="distill", **how)


def test_a_rank_lost_under_the_teacher_comes_back_to_the_same_steps(teacher: Path, tmp_path: Path) -> None:
    with distilling(tmp_path, teacher, "--nproc", 2, "--max-restarts", 1) as job:
        job.reach(8)
        before = curve(job.run)
        os.kill(job.ranks()[1], signal.SIGKILL)
        status, _, err = job.end()
    assert status == 0, err
    assert "rank 1 ended by SIGKILL; starting again (1 of 1)" in err
    assert "Traceback" not in err
    after = curve(job.run)
    assert after[: len(before)] == before, "steps after the checkpoint of step 5 were taken twice"
    assert [row["step"] for row in after] == list(range(1, 26))
    assert [row["step"] for row in after if "kl" in row] == list(range(1, 16))


@pytest.mark.nightly
def test_a_silent_teacher_may_be_gone(teacher: Path, tmp_path: Path) -> None:
    """Reason to be nightly: two starts."""
    with distilling(tmp_path, teacher, "--nproc", 2) as job:
        job.reach(17)
        job.process.send_signal(signal.SIGINT)
        assert job.end()[0] == 130
    shutil.rmtree(tmp_path / "teacher")
    with distilling(tmp_path, teacher, "--nproc", 2, "--resume") as job:
        job.succeed()
    assert [row["step"] for row in curve(job.run) if "kl" not in row] == list(range(16, 26))


@pytest.mark.nightly
def test_a_damaged_part_of_the_teacher_is_told_once(teacher: Path, tmp_path: Path) -> None:
    """One rank's file. Reason to be nightly: `test_jobs.py` has the same of the program that is trained."""
    shutil.copytree(teacher, tmp_path / "teacher")
    part = next((tmp_path / "teacher").rglob("expert_2-1.safetensors"))
    part.write_bytes(part.read_bytes()[:-7])
    with distilling(tmp_path, teacher, "--nproc", 2) as job:
        status, out, err = job.end()
    assert status == 2, out + err
    lines = told(err)
    assert part.name in lines[0], err
    assert len(lines) <= 4, err


@pytest.mark.nightly
def test_a_rank_that_hangs_in_the_teacher_is_named_with_the_teachers_layer(
    teacher: Path, tmp_path: Path
) -> None:
    """Reason to be nightly: it waits for a time limit; `test_jobs.py` does so every day."""
    fault = {
        "SIGNAL": "SIGSTOP", "RANK": 1, "STEP": 3, "LAYER": "the teacher's moe_1", "DIRECTION": "forward"
    }  # fmt: skip
    env = {f"FAULT_{name}": value for name, value in fault.items()}
    with distilling(tmp_path, teacher, timeout=12, module=FAULTY, env=env) as job:
        status, _, err = job.end()
    assert status == 1
    lines = told(err)
    assert lines[0] == "rank 1"
    where = "all_to_all over teacher_expert_2 in the teacher's moe_1 (forward, step 3)"
    assert f"it did not enter {where}, in which rank 0 waits" in lines[1], err
    assert len(lines) == 4, err
