"""What is said of simulated ranks in test_train_ranks.py holds for real processes, with gloo."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from moec.program import Program
from moec.runtime.checkpoint import latest_checkpoint, load_checkpoint
from moec.runtime.data import TextData
from tests.runtime.rank_runs import PYRAMID, compiled, plan, train, train_on
from tests.runtime.ranks import run_processes
from tests.runtime.tiny import tiny_text

HOW: dict[str, Any] = {"steps": 3, "save_every": 2, "eval_every": 0}
DESCRIBED = plan({**PYRAMID, "capacity_factor": "dropless"}, expert=4)


def placed(world: int) -> Program:
    return compiled(DESCRIBED, world)


def data(folder: Path) -> TextData:
    """Every rank has a folder of its own for the text, which is the same."""
    folder.mkdir(exist_ok=True)
    return tiny_text(folder)


def body(rank: int, world: int, folder: Path) -> list[list[float]]:
    """Losses and norms of a run, and of one that was stopped on the way."""
    text, program = data(folder / f"text-{rank}"), placed(world)
    whole = train(program.partition(rank), text, folder / "whole", **HOW)
    first = train(program.partition(rank), text, folder / "parts", stop_at=2, **HOW)
    second = train(program.partition(rank), text, folder / "parts", resume=True, **HOW)
    runs = [whole.history, first.history + second.history]
    return [[number for record in run for number in (record.loss, record.grad_norm)] for run in runs]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    path = latest_checkpoint(folder)
    assert path is not None
    return dict(load_checkpoint(path).tensors["parameters"])


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.nightly)])
def test_processes_train_as_one_does(tmp_path: Path, world: int) -> None:
    (alone,) = train_on(1, DESCRIBED, data(tmp_path / "text"), tmp_path / "one", **HOW)
    expected = [number for record in alone.history for number in (record.loss, record.grad_norm)]
    mesh = placed(world).layout
    assert mesh is not None
    ranks = run_processes(mesh.mesh, functools.partial(body, world=world, folder=tmp_path))
    for whole, parts in ranks:
        assert whole == parts == ranks[0][0]
        assert whole == pytest.approx(expected, rel=1e-9)
    found, again = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name, value in weights(tmp_path / "one").items():
        assert torch.equal(found[name], again[name])
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-10)
