"""Lessons on disk are what the teacher says live, whoever was killed on the way; others are refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from rich.console import Console

from moec.errors import ArtifactError, MoecError, PlanError
from moec.ir.mesh import Mesh
from moec.plan import Distill, Train
from moec.runtime.checkpoint import digest_of
from moec.runtime.data import Batch, TextData
from moec.runtime.distillation import lesson_files
from moec.runtime.distillation.lesson import Lesson, TopWords
from moec.runtime.distillation.lesson_files import MANIFEST, Facts, read_shard, shard_path
from moec.runtime.distillation.store import StoredLessons, samples_taught, store_lessons
from moec.runtime.distillation.stored import StoredTeacher
from moec.runtime.distillation.teacher import LiveTeacher
from moec.runtime.ranks import Ranks
from moec.runtime.simulated import run_ranks
from tests.runtime.tiny import TinyProgram, tiny_text
from tests.runtime.tiny_teaching import (
    QUIET,
    assert_equal_states,
    state,
    taught,
    tiny_teacher,
)

TOP = Distill(alpha=2.0, temperature=1.5, top_k=8)
SHARD, BATCH = 12, 4


@pytest.fixture
def data(tmp_path: Path) -> TextData:
    return tiny_text(tmp_path)


def store(
    data: TextData, folder: Path, count: int = 40, *, distill: Distill = TOP,
    teacher: LiveTeacher | None = None, **how: Any,
) -> StoredLessons:  # fmt: skip
    """The first `count` samples of a run."""
    speaker = teacher or LiveTeacher(tiny_teacher(), distill)
    given = {"batch": BATCH, "shard": SHARD, "console": QUIET, **how}
    return store_lessons(speaker, data, given.pop("seed", 0), range(count), folder, **given)


def refusal(action: Callable[[], object], kind: type[MoecError] = ArtifactError) -> str:
    """What an error says."""
    with pytest.raises(kind) as caught:
        action()
    return str(caught.value)


# the same lessons


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_learns_the_same_bits_as_of_the_teacher_live(
    data: TextData, tmp_path: Path, accumulate: int
) -> None:
    store(data, tmp_path / "lessons", batch=BATCH // accumulate)
    stored = StoredTeacher(tmp_path / "lessons", TOP, data, 0, samples=range(40))
    students = TinyProgram(), TinyProgram()
    live, read = (
        taught(student, data, tmp_path / name, distill=TOP, teacher=teacher, accumulate=accumulate).run()
        for student, name, teacher in zip(students, ("live", "read"), (None, stored), strict=True)
    )
    assert [row.kl for row in read.history] == [row.kl for row in live.history]
    assert len(live.history) == 10
    assert_equal_states(*map(state, students))


def test_fewer_words_than_were_stored(data: TextData, tmp_path: Path) -> None:
    store(data, tmp_path / "lessons")
    fewer = TOP.model_copy(update={"top_k": 3})
    batch = data.train_batch(0, 8, BATCH)
    read = StoredTeacher(tmp_path / "lessons", fewer, data, 0).lesson(batch, 8).told
    live = LiveTeacher(tiny_teacher(), fewer).lesson(batch, 8).told
    assert isinstance(read, TopWords)
    assert isinstance(live, TopWords)
    assert torch.equal(read.words, live.words)
    assert torch.equal(read.log_shares, live.log_shares)
    assert (read.words.dtype, read.log_shares.dtype) == (torch.long, torch.float32)


def test_stretches_of_ranks_and_ends_of_shards(data: TextData, tmp_path: Path) -> None:
    store(data, tmp_path / "lessons")
    alone = StoredTeacher(tmp_path / "lessons", TOP, data, 0)

    def told(teacher: StoredTeacher, position: int, size: int) -> torch.Tensor:
        said = teacher.lesson(data.train_batch(0, position, size), position).told
        assert isinstance(said, TopWords)
        return said.words

    every = torch.cat([told(alone, first, SHARD) for first in range(0, 48, SHARD)])
    for world, position, size in ((2, 0, 4), (2, 10, 5), (3, 7, 30), (4, 5, 3)):
        mesh = Mesh(data=world)

        def body(rank: int, mesh: Mesh = mesh, position: int = position, size: int = size) -> torch.Tensor:
            return told(StoredTeacher(tmp_path / "lessons", TOP, data, 0, Ranks(mesh, rank)), position, size)

        parts = run_ranks(mesh, body)
        assert [len(part) for part in parts] == [len(part) for part in torch.arange(size).tensor_split(world)]
        assert torch.equal(torch.cat(parts), every[position : position + size])


def test_no_more_than_two_shards_are_held(data: TextData, tmp_path: Path) -> None:
    store(data, tmp_path / "lessons")
    teacher = StoredTeacher(tmp_path / "lessons", TOP, data, 0)
    for position in range(0, 40, BATCH):
        teacher.lesson(data.train_batch(0, position, BATCH), position)
        assert len(teacher._held) <= 2


# on disk


def test_what_a_token_takes(data: TextData, tmp_path: Path) -> None:
    wide = store(data, tmp_path / "wide")
    narrow = store(data, tmp_path / "narrow", shares="f16")
    assert (wide.facts.bytes_per_token, narrow.facts.bytes_per_token) == (8 * (2 + 4), 8 * (2 + 2))
    header = 400  # bytes a file
    tokens = 48 * data.sequence
    for made in (wide, narrow):
        assert 0 < made.num_bytes - tokens * made.facts.bytes_per_token < 4 * header
        assert made.bytes_per_token == made.num_bytes / tokens


def test_large_vocabularies_take_four_bytes_a_word() -> None:
    facts = Facts(
        teacher={}, data="", seed=0, sequence=1, vocabulary=65537, top_k=2, temperature=1.0, dtype="fp32",
        shard=1, batch=1,
    )  # fmt: skip
    words, _ = facts.packed(np.array([[[65536, 0]]]), np.zeros((1, 1, 2)))
    assert words.tolist() == [[[65536, 0]]]
    assert facts.bytes_per_token == 2 * (4 + 4)
    words, _ = facts.model_copy(update={"vocabulary": 65536}).packed(np.array([[[65535]]]), np.zeros(1))
    assert (words.dtype, words.tolist()) == (np.uint16, [[[65535]]])


def test_half_the_bytes_of_a_share_cost_the_divergence_little(data: TextData, tmp_path: Path) -> None:
    how = {"distill": TOP, "steps": 3}
    store(data, tmp_path / "narrow", shares="f16")
    stored = StoredTeacher(tmp_path / "narrow", TOP, data, 0)
    live, read = (
        taught(TinyProgram(), data, tmp_path / name, teacher=teacher, **how).run().history
        for name, teacher in (("a", None), ("b", stored))
    )
    for one, other in zip(live, read, strict=True):
        assert one.kl != other.kl
        assert other.kl == pytest.approx(one.kl, rel=1e-3)


def test_a_stored_run_says_what_it_did(data: TextData, tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as file:
        store(data, tmp_path / "lessons", console=Console(file=file))
    assert (tmp_path / "out").read_text().startswith("48 samples stored")


def test_the_samples_of_a_staged_run() -> None:
    train = Train(steps=10, batch=6)
    assert samples_taught(train, Distill(stop=0.7)) == range(42)
    assert samples_taught(train, Distill(stop_step=2)) == range(12)


# killed, and resumed


class MortalTeacher(LiveTeacher):
    """Keeps where it was asked, and kills its process when it is asked for the `last` time."""

    def __init__(self, last: int = -1) -> None:
        super().__init__(tiny_teacher(), TOP)
        self.last, self.asked = last, list[int]()

    def lesson(self, batch: Batch, position: int) -> Lesson:
        self.asked.append(position)
        if len(self.asked) == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().lesson(batch, position)


def in_a_process_that_dies(action: Callable[[], object]) -> None:
    """Run `action` in a copy of this process, which has to be killed."""
    child = os.fork()
    if not child:
        try:
            action()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def assert_same_files(left: Path, right: Path) -> None:
    """The same names and the same bytes."""
    names = sorted(path.name for path in left.iterdir())
    assert names == sorted(path.name for path in right.iterdir())
    for name in names:
        assert (left / name).read_bytes() == (right / name).read_bytes(), name


@pytest.mark.parametrize("asked", [1, 3, 5, 12])
def test_killed_and_resumed(data: TextData, tmp_path: Path, asked: int) -> None:
    store(data, tmp_path / "whole")
    folder = tmp_path / "lessons"
    in_a_process_that_dies(lambda: store(data, folder, teacher=MortalTeacher(last=asked)))
    there = len(list(folder.glob("lessons-*")))
    assert there == (asked - 1) // (SHARD // BATCH)
    again = MortalTeacher()
    assert store(data, folder, teacher=again).computed == 48 - there * SHARD
    assert again.asked == list(range(there * SHARD, 48, BATCH))
    assert_same_files(folder, tmp_path / "whole")


def test_killed_while_a_shard_is_written(
    data: TextData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(data, tmp_path / "whole")
    folder, synced = tmp_path / "lessons", lesson_files.sync

    def dies(path: Path) -> None:
        if "000012" in path.name:
            os.kill(os.getpid(), signal.SIGKILL)
        synced(path)

    with monkeypatch.context() as patch:
        patch.setattr(lesson_files, "sync", dies)
        in_a_process_that_dies(lambda: store(data, folder))
    assert sorted(path.name for path in folder.iterdir()) == [
        ".storing-lessons-000000012.safetensors", "lessons-000000000.safetensors", MANIFEST
    ]  # fmt: skip
    store(data, folder)
    assert_same_files(folder, tmp_path / "whole")


def test_more_samples_later(data: TextData, tmp_path: Path) -> None:
    store(data, tmp_path / "whole")
    assert store(data, tmp_path / "lessons", 13).computed == 24
    assert store(data, tmp_path / "lessons", 40).computed == 24
    assert store(data, tmp_path / "lessons", 40).computed == 0
    assert_same_files(tmp_path / "lessons", tmp_path / "whole")


def test_samples_in_the_middle(data: TextData, tmp_path: Path) -> None:
    teacher = LiveTeacher(tiny_teacher(), TOP)
    made = store_lessons(
        teacher, data, 0, range(13, 25), tmp_path / "lessons", batch=BATCH, shard=SHARD, console=QUIET
    )
    assert made.computed == 24
    assert sorted(made.facts.firsts(made.samples)) == [12, 24]
    StoredTeacher(tmp_path / "lessons", TOP, data, 0, samples=range(13, 25))
    missing = lambda: StoredTeacher(tmp_path / "lessons", TOP, data, 0, samples=range(25))
    assert "lessons-000000000.safetensors" in refusal(missing)


# damaged, foreign, edited


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 3)


def flipped(path: Path) -> None:
    told = bytearray(path.read_bytes())
    told[-9] ^= 4
    path.write_bytes(bytes(told))


def renamed(path: Path) -> None:
    shutil.copy(path.parent / "lessons-000000000.safetensors", path)


def foreign(path: Path) -> None:
    other = path.parent.parent / "other"
    store(tiny_text(path.parent.parent), other, seed=1)
    shutil.copy(other / path.name, path)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def relabelled(path: Path) -> None:
    """Other words under the header of the shard."""
    with safetensors.safe_open(path, framework="np") as file:
        header, words = file.metadata(), file.get_tensor("words")
    safetensors.numpy.save_file({"words": words}, path, metadata=header)


DAMAGE = {
    cut_short: "cut short", flipped: "other bytes", renamed: "from sample 0 on",
    foreign: "another teacher, text or setting", emptied: "cut short", relabelled: "tensors words",
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_shard_that_is_not_as_it_was_is_refused_by_name(
    data: TextData, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = tmp_path / "lessons"
    store(data, folder)
    path = shard_path(folder, 24)
    damage(path)

    def read() -> None:
        teacher = StoredTeacher(folder, TOP, data, 0)
        teacher.lesson(data.train_batch(0, 24, BATCH), 24)

    for action in (read, lambda: store(data, folder)):
        said = refusal(action)
        assert path.name in said
        assert DAMAGE[damage] in said
    path.unlink()  # as the error advises
    assert store(data, folder).computed == SHARD
    read()


def test_a_missing_shard_is_named(data: TextData, tmp_path: Path) -> None:
    store(data, tmp_path / "lessons", 13)
    teacher = StoredTeacher(tmp_path / "lessons", TOP, data, 0)
    said = refusal(lambda: teacher.lesson(data.train_batch(0, 24, 4), 24))
    assert "lessons-000000024.safetensors" in said
    assert "no lessons from sample 24 on" in said


def test_manifests(data: TextData, tmp_path: Path) -> None:
    folder = tmp_path / "lessons"

    def opened() -> StoredTeacher:
        return StoredTeacher(folder, TOP, data, 0)

    assert "no such folder" in refusal(opened)
    store(data, folder, 4)
    path = folder / MANIFEST
    whole = path.read_text()
    path.write_text(whole.replace('"top_k": 8', '"top_k": 9'))
    assert "edited" in refusal(opened)
    path.write_text(whole[:-20])
    assert "not the JSON" in refusal(opened)
    told = {**json.loads(whole), "version": 2}
    told["digest"] = digest_of({name: value for name, value in told.items() if name != "digest"})
    path.write_text(json.dumps(told))
    assert "version 2" in refusal(opened)
    path.unlink()
    assert "no manifest.json" in refusal(opened)
    assert "something else is there" in refusal(lambda: store(data, folder, 4))


# lessons that do not fit


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"temperature": 2.0}, "distill.temperature"),
        ({"dtype": "bf16"}, "distill.dtype"),
        ({"top_k": 9}, "top_k = 8"),
        ({"top_k": None}, "left out: all words"),
        ({"hidden": 0.5}, "words alone"),
    ],
)
def test_settings_that_stored_lessons_cannot_serve(
    data: TextData, tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    store(data, tmp_path / "lessons", 4)
    distill = TOP.model_copy(update=changed)
    assert said in refusal(lambda: StoredTeacher(tmp_path / "lessons", distill, data, 0), PlanError)


def test_another_run(data: TextData, tmp_path: Path) -> None:
    folder = tmp_path / "lessons"
    store(data, folder, 4)
    longer = tiny_text(tmp_path, sequence=9)
    (tmp_path / "more").mkdir()
    other = tiny_text(tmp_path / "more", repeats=401)
    assert "(data)" in refusal(lambda: StoredTeacher(folder, TOP, other, 0))
    assert "(data)" in refusal(lambda: StoredTeacher(folder, TOP, longer, 0))
    assert "seed 3, that of this run" in refusal(lambda: StoredTeacher(folder, TOP, data, 3))
    assert "vocabulary 300" in refusal(lambda: StoredTeacher(folder, TOP, data, 0, vocabulary=300))
    someone, same = (LiveTeacher(tiny_teacher(seed=seed), TOP).identity() for seed in (6, 5))
    assert "another teacher" in refusal(lambda: StoredTeacher(folder, TOP, data, 0, teacher=someone))
    StoredTeacher(folder, TOP, data, 0, teacher=same, vocabulary=256)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("seed", {"seed": 1}),
        ("batch", {"batch": 2}),
        ("shard", {"shard": 4}),
        ("shares", {"shares": "f16"}),
        ("temperature", {"distill": Distill(top_k=8)}),
        ("top_k", {"distill": Distill(top_k=7, temperature=1.5)}),
        ("teacher", {"teacher": LiveTeacher(tiny_teacher(seed=6), TOP)}),
    ],
)
def test_a_folder_holds_one_kind_of_lessons(
    data: TextData, tmp_path: Path, name: str, how: dict[str, Any]
) -> None:
    store(data, tmp_path / "lessons", 4)
    assert f"manifest.json ({name})" in refusal(lambda: store(data, tmp_path / "lessons", 4, **how))


def test_what_cannot_be_stored(data: TextData, tmp_path: Path) -> None:
    assert "left out" in refusal(lambda: store(data, tmp_path / "a", distill=Distill()), PlanError)
    assert "batch = 0" in refusal(lambda: store(data, tmp_path / "a", batch=0), PlanError)
    assert not (tmp_path / "a").exists()


def test_reading_checks_what_the_files_say(data: TextData, tmp_path: Path) -> None:
    made = store(data, tmp_path / "lessons", 4)
    words, log_shares = read_shard(made.folder, made.facts, 0)
    assert (words.shape, words.dtype, log_shares.dtype) == ((SHARD, 8, 8), np.uint16, np.float32)
    assert (np.diff(log_shares, axis=-1) <= 0).all()
