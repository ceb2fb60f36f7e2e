"""Checkpoints are whole or not there, and say which file is at fault when they are not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moec.errors import ArtifactError
from moec.runtime.checkpoint import (
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)

# Saves step 1, then tries to save step 2 once for every call into the file system that makes it, each time in
# a forked process that kills itself (SIGKILL: nothing is cleaned up) just before that call. One line a try.
KILLED_WHILE_SAVING = """
import os, pathlib, signal, sys
import torch
from moec.runtime import checkpoint
torch.set_num_threads(1)
root = pathlib.Path(sys.argv[1])

def save(step):
    tensors = {"parameters": {"weight": torch.full((64, 64), float(step))}, "random": {"cpu": torch.ones(5)}}
    checkpoint.save_checkpoint(root, step, tensors, {"position": step}, keep=1)

def dying(function, countdown):
    def call(*args, **kwargs):
        countdown[0] -= 1
        if countdown[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

save(1)
for point in range(1, 100):
    child = os.fork()
    if child == 0:
        countdown = [point]
        os.fsync = dying(os.fsync, countdown)
        checkpoint.save_file = dying(checkpoint.save_file, countdown)
        pathlib.Path.rename = dying(pathlib.Path.rename, countdown)
        pathlib.Path.write_text = dying(pathlib.Path.write_text, countdown)
        checkpoint.shutil.rmtree = dying(checkpoint.shutil.rmtree, countdown)
        save(2)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    latest = checkpoint.load_checkpoint(checkpoint.latest_checkpoint(root))
    whole = bool((latest.tensors["parameters"]["weight"] == latest.step).all())
    print(os.WIFSIGNALED(status), latest.step, whole, flush=True)
    if not os.WIFSIGNALED(status):
        break
"""


def save(root: Path, step: int, keep: int = 2) -> Path:
    tensors = {"parameters": {"weight": torch.full((5, 7), float(step))}, "random": {"cpu": torch.arange(3)}}
    return save_checkpoint(root, step, tensors, {"position": 4 * step}, keep)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = save(tmp_path / "run", 3)
    loaded = load_checkpoint(path)
    assert (loaded.step, loaded.record) == (3, {"position": 12})
    assert torch.equal(loaded.tensors["parameters"]["weight"], torch.full((5, 7), 3.0))
    assert torch.equal(loaded.tensors["random"]["cpu"], torch.arange(3))
    assert {file.name for file in path.iterdir()} == {
        "manifest.json", "parameters.safetensors", "random.safetensors",
    }  # fmt: skip


def test_shared_and_strided_memory_is_saved_as_values(tmp_path: Path) -> None:
    weight = torch.arange(12.0).view(3, 4)
    group = {"weight": weight, "same": weight, "turned": weight.t(), "row": weight[1], "none": torch.empty(0)}
    loaded = load_checkpoint(save_checkpoint(tmp_path, 1, {"parameters": group}, {}))
    for name, tensor in group.items():
        assert torch.equal(loaded.tensors["parameters"][name], tensor), name


def test_the_newest_are_kept_in_order_of_steps(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none") is None
    for step in (1, 20, 100, 99_999_999, 100_000_000):
        save(tmp_path, step, keep=3)
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step-00000100", "step-99999999", "step-100000000",
    ]  # fmt: skip
    assert latest_checkpoint(tmp_path) == tmp_path / "step-100000000"


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = save_checkpoint(tmp_path, 1, {"parameters": {"weight": torch.zeros(2)}}, {})
    assert list(load_checkpoint(path).tensors) == ["parameters"]
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    tries = [line.split() for line in done.stdout.splitlines()]
    killed, finished = tries[:-1], tries[-1]
    assert len(killed) >= 8  # two tensor files, the manifest, folders synced, the rename, the old one removed
    assert all(signalled == "True" and whole == "True" for signalled, _, whole in killed)
    assert {step for _, step, _ in killed} == {"1", "2"}  # before the rename, and after it
    assert finished == ["False", "2", "True"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def _empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [_cut, _flip, _empty, Path.unlink])
@pytest.mark.parametrize("name", ["parameters.safetensors", "random.safetensors", "manifest.json"])
def test_damage_is_refused_by_name_of_file(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    damage(path / name)
    with pytest.raises(ArtifactError) as caught:
        load_checkpoint(path)
    assert caught.value.where == str(path / name)
    assert str(tmp_path / "step-00000001") in caught.value.nearest


def test_an_edited_manifest_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1) / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "step": 7}))
    with pytest.raises(ArtifactError, match="edited"):
        load_checkpoint(path.parent)
    path.write_text(json.dumps({**manifest, "version": 2}))
    with pytest.raises(ArtifactError, match="version 2"):
        load_checkpoint(path.parent)
    path.write_text(json.dumps([1]))
    with pytest.raises(ArtifactError, match="not the JSON"):
        load_checkpoint(path.parent)


def test_a_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "step-00000001")
