"""Runs on ranks that stop and go on: on the same mesh to the bit, on another one with the same loss."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moec.errors import ArtifactError, MoecError, TrainError
from moec.ir.mesh import Mesh
from moec.runtime import checkpoint as checkpoint_module
from moec.runtime import train as train_module
from moec.runtime.checkpoint import latest_checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from moec.runtime.data import TextData
from moec.runtime.interrupt import Interrupt
from moec.runtime.ranks import Ranks
from moec.runtime.records import read_records
from moec.runtime.simulated import run_ranks
from moec.runtime.train import TrainResult
from tests.runtime.rank_runs import PYRAMID, compiled, plan, train, train_on
from tests.runtime.tiny import tiny_text


@pytest.fixture
def data(tmp_path: Path) -> TextData:
    return tiny_text(tmp_path)


def losses(*results: TrainResult) -> list[float]:
    return [record.loss for result in results for record in result.history]


def tensors(path: Path | None) -> dict[str, Tensor]:
    """Everything in a checkpoint but random states, whole."""
    assert path is not None
    saved = load_checkpoint(path).tensors
    return {name: value for stem, group in saved.items() if stem != "random" for name, value in group.items()}


def test_a_run_on_ranks_is_the_run_of_one_process(data: TextData, tmp_path: Path) -> None:
    described = plan(expert=4)
    how = {"steps": 4, "eval_every": 2, "save_every": 4}
    (alone,) = train_on(1, described, data, tmp_path / "one", **how)
    ranks = train_on(4, described, data, tmp_path / "four", **how)
    for told in ranks:
        assert losses(told) == losses(ranks[0]) == pytest.approx(losses(alone), rel=1e-9)
        assert [record.load for record in told.history] == [record.load for record in alone.history]
        for mine, expected in zip(told.evaluations, alone.evaluations, strict=True):
            assert mine.evaluation.loss == pytest.approx(expected.evaluation.loss, rel=1e-9)
            assert mine.evaluation.counts == expected.evaluation.counts
    rows = read_records(tmp_path / "four/train.jsonl")  # of the first rank alone
    assert [(row["kind"], row["step"]) for row in rows] == [
        (row["kind"], row["step"]) for row in read_records(tmp_path / "one/train.jsonl")
    ]
    found, expected_ = tensors(ranks[0].checkpoint), tensors(alone.checkpoint)
    assert found.keys() == expected_.keys()
    for name, value in expected_.items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_same_mesh_goes_on_bit_for_bit(data: TextData, tmp_path: Path, dtype: str) -> None:
    described = plan({**PYRAMID, "balance": "bias", "bias_rate": 0.01}, expert=2)
    how: dict[str, Any] = {"steps": 5, "dtype": dtype, "save_every": 2, "eval_every": 0}
    how |= {"weights": torch.float32, "dropout": 0.2}
    whole = train_on(2, described, data, tmp_path / "whole", **how)
    first = train_on(2, described, data, tmp_path / "parts", stop_at=3, **how)
    second = train_on(2, described, data, tmp_path / "parts", resume=True, **how)
    assert losses(first[0], second[0]) == losses(whole[0])
    found, expected = tensors(second[1].checkpoint), tensors(whole[1].checkpoint)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert bool(expected["moe_1.bias"].any())


def test_a_run_moves_from_mesh_to_mesh(data: TextData, tmp_path: Path) -> None:
    how: dict[str, Any] = {"steps": 5, "save_every": 0, "eval_every": 0}
    (whole,) = train_on(1, plan(), data, tmp_path / "whole", **how)
    legs: list[tuple[int, dict[str, Any]]] = [
        (4, {"expert": 4}), (2, {"expert": 1}), (3, {"tensor": 3}), (1, {}), (4, {"expert": 2, "slice": 2}),
    ]  # fmt: skip
    done = []
    for step, (world, parallel) in enumerate(legs, start=1):
        told = train_on(
            world, plan(**parallel), data, tmp_path / "moved", resume=step > 1, stop_at=step, **how
        )
        done.append(told[0])
    assert losses(*done) == pytest.approx(losses(whole), rel=1e-9)


def test_what_cannot_be_resumed_on_another_mesh(data: TextData, tmp_path: Path) -> None:
    how: dict[str, Any] = {"steps": 1, "eval_every": 0}
    train_on(2, plan(expert=2), data, tmp_path / "run", **how)
    other = plan({**PYRAMID, "top_k": 1})
    with pytest.raises(ArtifactError, match="layers"):
        train_on(1, other, data, tmp_path / "run", resume=True, **how)
    with pytest.raises(TrainError, match="checkpoints of another run"):
        train_on(2, plan(expert=2), data, tmp_path / "run", **how)


@pytest.mark.parametrize("name", ["parameters-00001.safetensors", "optimizer-00000.safetensors"])
def test_a_damaged_shard_is_named_by_every_rank(data: TextData, tmp_path: Path, name: str) -> None:
    how: dict[str, Any] = {"steps": 2, "save_every": 1, "eval_every": 0}
    placed = compiled(plan(expert=2), 2)
    assert placed.layout is not None
    train_on(2, plan(expert=2), data, tmp_path / "run", **how)
    path = tmp_path / "run/step-00000002" / name
    spoilt = bytearray(path.read_bytes())
    spoilt[-3] ^= 1
    path.write_bytes(bytes(spoilt))

    def told(rank: int) -> MoecError:
        local = placed.partition(rank)
        with pytest.raises(ArtifactError) as caught:
            train(local, data, tmp_path / "run", resume=True, **how)
        return caught.value

    for error in run_ranks(placed.layout.mesh, told):
        assert error.where == str(path)
        assert "digest" in error.found
        assert "step-00000001" in error.nearest


MESH = Mesh(data=2)


def save(root: Path, step: int, rank: int, keep: int = 2) -> Path:
    held = {
        "parameters": {f"weight_{rank}": torch.full((16, 16), float(step))},
        "random": {"cpu": torch.ones(5)},
    }
    return save_checkpoint(root, step, held, {"position": step}, keep, Ranks(MESH, rank))


def test_an_error_of_one_rank_keeps_the_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_ranks(MESH, lambda rank: save(tmp_path, 1, rank))
    write = checkpoint_module.save_file

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        if "parameters-00001" in path.name:
            raise OSError(28, "No space left on device")
        write(tensors, path, metadata)

    def failing(rank: int) -> str:
        with pytest.raises((OSError, TrainError)) as caught:
            save(tmp_path, 2, rank)
        return str(caught.value)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_module, "save_file", full)
        told = run_ranks(MESH, failing)
    assert all("No space left on device" in text for text in told)
    assert "rank 1" in told[0]
    assert list_checkpoints(tmp_path) == [tmp_path / "step-00000001"]
    run_ranks(MESH, lambda rank: save(tmp_path, 2, rank))  # the draft that was left behind is in nobody's way
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001", "step-00000002"]
    assert not list(tmp_path.glob(".saving-*"))


# Like the test of the same name in test_checkpoint.py, with two ranks; any of them may be the one that dies.
KILLED_WHILE_SAVING = """
import os, pathlib, signal, sys
import torch
from moec.runtime import checkpoint
from moec.runtime.simulated import run_ranks
from tests.runtime.test_rank_checkpoints import MESH, save
torch.set_num_threads(1)
root = pathlib.Path(sys.argv[1])

def dying(function, countdown):
    def call(*args, **kwargs):
        countdown[0] -= 1
        if countdown[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

def save_all(step):
    run_ranks(MESH, lambda rank: save(root, step, rank, keep=1))

def in_child(function):
    child = os.fork()
    if child == 0:
        function()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])

def save_dying(point):
    countdown = [point]
    os.fsync = dying(os.fsync, countdown)
    checkpoint.save_file = dying(checkpoint.save_file, countdown)
    pathlib.Path.rename = dying(pathlib.Path.rename, countdown)
    pathlib.Path.write_text = dying(pathlib.Path.write_text, countdown)
    checkpoint.shutil.rmtree = dying(checkpoint.shutil.rmtree, countdown)
    save_all(2)

in_child(lambda: save_all(1))
for point in range(1, 100):
    killed = in_child(lambda: save_dying(point))
    latest = checkpoint.load_checkpoint(checkpoint.latest_checkpoint(root))
    weights = latest.tensors["parameters"]
    whole = len(weights) == 2 and all(bool((weight == latest.step).all()) for weight in weights.values())
    print(killed, latest.step, whole, flush=True)
    if not killed:
        break
"""


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    tries = [line.split() for line in done.stdout.splitlines()]
    killed, finished = tries[:-1], tries[-1]
    # four tensor files, the manifest, the folders synced, the rename, the old checkpoint removed
    assert len(killed) >= 12
    assert all(signalled == "True" and whole == "True" for signalled, _, whole in killed)
    assert {step for _, step, _ in killed} == {"1", "2"}  # before the rename, and after it
    assert finished == ["False", "2", "True"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000002"


def test_an_interrupt_of_one_rank_saves_on_all(
    data: TextData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Second(Interrupt):
        """Interrupts the rank that enters second, before its third step."""

        entered = 0

        def __enter__(self) -> Second:
            type(self).entered += 1
            self.is_second, self.looks = type(self).entered == 2, 0
            return self

        def __getattribute__(self, name: str) -> Any:
            if name != "requested":
                return super().__getattribute__(name)
            self.looks += 1
            return self.is_second and self.looks > 2

    monkeypatch.setattr(train_module, "Interrupt", Second)
    told = train_on(2, plan(expert=2), data, tmp_path / "run", steps=5, eval_every=0)
    assert [(result.step, result.interrupted) for result in told] == [(2, True)] * 2
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run/step-00000002"
