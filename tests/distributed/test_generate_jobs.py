"""`moec generate` on two local ranks: the text of one process, told once; faults and mistakes too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moec.cli import app
from tests.distributed.jobs import FAULTY, GPT, LONG, environment, told, write_plan

WORDS = ["generate", GPT, "--plan", "plan.toml", "-n", "9", "--temperature", "1", "--seed", "2"]
MOEC = ["-m", "moec"]


def job(
    folder: Path, *words: str, module: list[str] = MOEC, given: str = "", **env: object
) -> tuple[int, str, str]:
    """A command in `folder` that reads `given`: exit status, standard output, standard error."""
    done = subprocess.run(
        [sys.executable, *module, *words], cwd=folder, env=environment(**env), input=given, text=True,
        capture_output=True, timeout=LONG,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, but for the plan of two expert ranks."""
    write_plan(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def alone(*words: str, given: str = "") -> str:
    """What one process writes."""
    return CliRunner().invoke(app, list(words), input=given, catch_exceptions=False).stdout


def test_two_ranks_write_what_one_writes_and_rank_0_prints_it(folder: Path) -> None:
    """The prompt comes from standard input, which both ranks could read."""
    words = [*WORDS, "--prompt", "-", "--stop", "never this"]
    status, out, err = job(folder, *words, "--nproc", "2", given="ab cd")
    assert status == 0, err
    assert out == alone(*words, given="ab cd")


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_a_saved_program_ends_after_a_stop_under_torchrun(folder: Path) -> None:
    """Reason to be nightly: three starts. The rank that reaches the stop lets the other one go too."""
    status, _, err = job(folder, "compile", GPT, "--plan", "plan.toml", "--out", "saved")
    assert status == 0, err
    words = ["generate", "saved", "--prompt", "abc", "-n", "12", "--temperature", "1"]
    whole = alone(*words)
    words += ["--stop", whole[5:7]]
    status, out, err = job(
        folder, *MOEC, *words, module=["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    )
    assert status == 0, err
    assert out == alone(*words)
    assert len(out) < len(whole)


def test_a_rank_that_is_killed_ends_the_job(folder: Path) -> None:
    fault = {"SIGNAL": "SIGKILL", "RANK": 1, "STEP": 4, "LAYER": "dispatch_1", "DIRECTION": "forward"}
    env = {f"FAULT_{name}": value for name, value in fault.items()}
    status, out, err = job(folder, *WORDS, "--prompt", "abc", module=FAULTY, **env)
    assert status == 128 + signal.SIGKILL, out + err
    assert "rank 1 ended by SIGKILL" in out + err
    assert "Traceback" not in err


@pytest.mark.nightly
def test_a_rank_that_hangs_is_named_with_the_step_it_hangs_in(folder: Path) -> None:
    """Reason to be nightly: it waits for the limit; the same watch has an everyday test in training."""
    fault = {"SIGNAL": "SIGSTOP", "RANK": 1, "STEP": 4, "LAYER": "dispatch_1", "DIRECTION": "forward"}
    env = {f"FAULT_{name}": value for name, value in fault.items()}
    write_plan(folder, timeout=12)
    began = time.monotonic()
    status, _, err = job(folder, *WORDS, "--prompt", "abc", module=FAULTY, **env)
    assert status == 1, err
    assert time.monotonic() - began < LONG / 2
    lines = told(err)
    assert lines[0] == "rank 1"
    assert "all_to_all over expert_2 in dispatch_1 (forward, step 4), in which rank 0 waits" in lines[1]
    assert len(lines) == 4, err


@pytest.mark.nightly
def test_a_reader_that_has_seen_enough_ends_it_quietly(folder: Path) -> None:
    """Reason to be nightly: one more start."""
    words = [*WORDS, "--prompt", "abc", "--nproc", "2"]
    process = subprocess.Popen(
        [sys.executable, *MOEC, *words], cwd=folder, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(1) == "a"
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(LONG) == 1, err
    assert told(err) == []


# mistakes: four lines, once, and status 2


def test_a_mistake_is_told_once(folder: Path) -> None:
    """One that only the program shows: it has 16 positions."""
    status, out, err = job(folder, *WORDS, "-n", "14", "--prompt", "abc", "--nproc", "2")
    assert status == 2, out + err
    where, found, needed, nearest = told(err)
    assert "moec generate, prompt 0" in where
    assert "found   a prompt of 3 tokens and 14 new ones: 17 positions" in found
    assert "at most 16 positions" in needed
    assert "--max-new-tokens 13" in nearest


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--prompt", ""], "an empty prompt"),
        (["--prompt", "a", "--stop", ""], "an empty text"),
        (["--prompt", "a", "--tokenizer", "nowhere.json"], "nowhere.json"),
    ],
)
def test_mistakes_that_need_no_ranks_to_be_seen(words: list[str], found: str, folder: Path) -> None:
    """They are told by the process that would start the ranks, in this one."""
    result = CliRunner().invoke(app, [*WORDS, *words, "--nproc", "2"])
    assert result.exit_code == 2
    assert found in result.output


def test_a_rank_starts_no_ranks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    monkeypatch.setattr(os, "environ", {**os.environ, **place})
    result = CliRunner().invoke(app, [*WORDS, "--prompt", "a", "--nproc", "2"])
    assert result.exit_code == 2
    assert "rank 1 of 2 already" in result.output
    assert "moec generate without torchrun" in result.output
