"""`moec train` on two local ranks: the same numbers, restarts, resumption, and faults.

Each test starts real processes that find each other over the loopback; the tests that need many starts are
`nightly`.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.distributed.jobs import FAULTY, GPT, Job, curve, told, write_plan

MANY_STARTS = 1800  # seconds, for the tests that start a job a dozen times


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of sixty steps on two ranks; tests read it and leave it alone."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with Job(folder, "--nproc", 2) as job:
        out = job.succeed()
    assert out.count("step 60/60") == 1, "rank 0 speaks, and nobody else"
    assert "moec generate run/program" in out
    return job.run


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three hundred steps on two ranks, for faults at random moments."""
    folder = tmp_path_factory.mktemp("longer")
    write_plan(folder, steps=300)
    with Job(folder, "--nproc", 2) as job:
        job.succeed()
    return job.run


@pytest.mark.nightly
def test_two_ranks_learn_what_one_process_learns(tmp_path: Path) -> None:
    """Reason to be nightly: the demo on ranks compares the same every day, in double precision."""
    curves = []
    for name, ranks in {"two": ["--nproc", 2], "one": []}.items():
        (tmp_path / name).mkdir()
        with Job(tmp_path / name, *ranks, "--steps", 20, model=f"{GPT}?dropout=0.0") as job:
            job.succeed()
        curves.append(curve(job.run))
    assert [row["step"] for row in curves[0]] == list(range(1, 21))
    for one, other in zip(*curves, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_a_lost_rank_is_started_again_and_nothing_shows(undisturbed: Path, tmp_path: Path) -> None:
    with Job(tmp_path, "--nproc", 2, "--max-restarts", 1) as job:
        job.reach(13)
        os.kill(job.ranks()[1], signal.SIGKILL)
        status, _, err = job.end()
    assert status == 0, err
    assert "rank 1 ended by SIGKILL; starting again (1 of 1)" in err
    assert "Traceback" not in err
    assert curve(job.run) == curve(undisturbed)


@pytest.mark.parametrize(
    ("layer", "direction", "op"),
    [
        pytest.param("moe_1", "backward", "all_to_all over expert_2", id="backward"),
        pytest.param(
            "dispatch_1", "forward", "all_reduce over data", id="forward", marks=pytest.mark.nightly
        ),
    ],
)
def test_a_rank_that_hangs_is_named_with_axis_operation_and_layer(
    layer: str, direction: str, op: str, tmp_path: Path
) -> None:
    write_plan(tmp_path, steps=1000, timeout=12)
    fault = {"SIGNAL": "SIGSTOP", "RANK": 1, "STEP": 3, "LAYER": layer, "DIRECTION": direction}
    env = {f"FAULT_{name}": value for name, value in fault.items()}
    with Job(tmp_path, module=FAULTY, env=env) as job:
        job.reach(2)
        began = time.monotonic()
        status, _, err = job.end()
    assert status == 1
    assert time.monotonic() - began < 12 + 12, (
        "the limit, and the launcher's patience with a rank that is stopped"
    )
    lines = told(err)
    assert lines[0] == "rank 1"
    assert f"it did not enter {op} in {layer} ({direction}, step 3), in which rank 0 waits" in lines[1]
    assert "within 12 s ([parallel] timeout)" in lines[2]
    assert "it does not answer" in lines[3]
    assert len(lines) == 4, err


@pytest.mark.nightly
def test_ctrl_c_saves_on_all_ranks_and_resume_goes_on(undisturbed: Path, tmp_path: Path) -> None:
    """Reason to be nightly: two starts; interruption and resumption have everyday tests of their own."""
    with Job(tmp_path, "--nproc", 2) as job:
        job.reach(13)
        job.process.send_signal(signal.SIGINT)
        status, out, err = job.end()
    assert status == 130, err
    assert "interrupted after step" in out
    assert "--nproc" not in err
    with Job(tmp_path, "--nproc", 2, "--resume") as job:
        job.succeed()
    assert curve(job.run) == curve(undisturbed)


# mistakes: four lines, once, and status 2


def refused(job: Job) -> str:
    with job:
        status, out, err = job.end()
    assert status == 2, out + err
    lines = told(err)
    assert [line.split()[0] for line in lines[1:3]] == ["found", "needed"], err
    assert len(lines) <= 4, err
    return "\n".join(lines)


def test_a_damaged_shard_is_named(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    newest = tmp_path / "run" / "step-00000060"
    shard = max(newest.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    said = refused(Job(tmp_path, "--nproc", 2, "--resume", "--steps", 70))
    assert str(shard.relative_to(tmp_path)) in said
    assert "digest differs" in said


def test_ranks_with_different_plans(tmp_path: Path) -> None:
    write_plan(tmp_path, name="other.toml", steps=61)
    port = free_port()
    env = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    jobs = [
        Job(tmp_path, env={**env, "RANK": 0}),
        Job(tmp_path, "--plan", "other.toml", env={**env, "RANK": 1}),
    ]
    ends = [job.end() for job in jobs]
    assert [status for status, _, _ in ends] == [2, 2]
    said = "\n".join(line for _, _, err in ends for line in told(err))
    assert said.count("found") == 1, said
    assert said.startswith("plan\n")
    assert "rank 1" in said


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# faults in numbers: long, so by night


def await_progress(job: Job) -> None:
    seen = len(curve(job.run))
    job.wait_until(lambda: len(curve(job.run)) != seen)


def await_other_ranks(job: Job, old: list[int]) -> None:
    job.wait_until(lambda: len(job.ranks()) == 2 and not set(job.ranks()) & set(old))


@pytest.mark.nightly
@pytest.mark.timeout(MANY_STARTS)
def test_a_dozen_kills_at_random_moments(longer: Path, tmp_path: Path) -> None:
    """A rank at random is killed a random time after each start; reason to be nightly: eleven starts."""
    write_plan(tmp_path, steps=300)
    draw, kills = random.Random(0), 0
    with Job(tmp_path, "--nproc", 2, "--max-restarts", 12) as job:
        while kills < 10:
            await_progress(job)
            time.sleep(draw.uniform(0, 0.4))
            ranks = job.ranks()
            os.kill(ranks[draw.randrange(len(ranks))], signal.SIGKILL)
            kills += 1
            await_other_ranks(job, ranks)
        status, _, err = job.end(MANY_STARTS)
    assert status == 0, err
    assert err.count("starting again") == 10
    assert curve(job.run) == curve(longer)


@pytest.mark.nightly
@pytest.mark.timeout(MANY_STARTS)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_kill_while_a_checkpoint_is_written(rank: int, longer: Path, tmp_path: Path) -> None:
    """Reason to be nightly: four starts."""
    write_plan(tmp_path, steps=300)
    caught = 0
    with Job(tmp_path, "--nproc", 2, "--max-restarts", 3) as job:
        for _ in range(3):
            ranks = job.ranks()
            job.wait_until(lambda: bool(list(job.run.glob(".saving-*"))), pause=0.0005)
            os.kill(job.ranks()[rank], signal.SIGKILL)
            caught += bool(list(job.run.glob(".saving-*")))
            await_other_ranks(job, ranks)
            await_progress(job)
        status, _, err = job.end(MANY_STARTS)
    assert status == 0, err
    assert caught, "no kill fell into a save"
    assert curve(job.run) == curve(longer)


@pytest.mark.nightly
@pytest.mark.timeout(MANY_STARTS)
def test_the_whole_job_killed_and_started_by_hand(longer: Path, tmp_path: Path) -> None:
    """Reason to be nightly: four starts."""
    write_plan(tmp_path, steps=300)
    for attempt in range(3):
        with Job(tmp_path, "--nproc", 2, *(["--resume"] if attempt else [])) as job:
            job.reach(40 * (attempt + 1))
            job.kill()
    with Job(tmp_path, "--nproc", 2, "--resume") as job:
        job.succeed()
    assert curve(job.run) == curve(longer)


@pytest.mark.nightly
def test_ranks_do_not_outlive_their_launcher(tmp_path: Path) -> None:
    """Reason to be nightly: it waits for a time limit."""
    write_plan(tmp_path, steps=100_000, timeout=12)
    with Job(tmp_path, "--nproc", 2) as job:
        job.reach(2)
        ranks = job.ranks()
        os.kill(job.process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while any(map(is_alive, ranks)) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not any(map(is_alive, ranks))


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.nightly
def test_torchrun_starts_the_same_job(undisturbed: Path, tmp_path: Path) -> None:
    """Reason to be nightly: `--nproc` starts the same processes every day."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moec"]
    with Job(tmp_path, module=torchrun) as job:
        job.succeed()
    assert curve(job.run) == curve(undisturbed)


@pytest.mark.nightly
def test_two_machines_start_again_together(undisturbed: Path, tmp_path: Path) -> None:
    """Two launchers of one rank each, as on two machines, that count restarts on their own.

    Reason to be nightly: the launchers wait for each other for half a minute and more.
    """
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "two"]
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--max-restarts",
        "3",
    ]
    module = [*torchrun, *rendezvous, "-m", "moec"]
    with Job(tmp_path, module=module) as one, Job(tmp_path, module=module) as other:
        one.reach(13)
        os.kill(other.ranks()[-1], signal.SIGKILL)
        ends = [job.end() for job in (one, other)]
    assert [status for status, *_ in ends] == [0, 0], ends
    assert curve(one.run) == curve(undisturbed)
