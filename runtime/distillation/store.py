"""Lessons computed ahead: a teacher speaks of the samples of a run, and what it says is kept on disk.

Samples are a function of seed and position (`moec.runtime.data`), so a teacher can be heard before there is a
student, once for many students, and on other ranks than theirs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moec.errors import ArtifactError, PlanError
from moec.ir.mesh import TENSOR
from moec.plan import Distill, Train
from moec.runtime.data import TextData
from moec.runtime.distillation.lesson import TopWords
from moec.runtime.distillation.lesson_files import (
    MANIFEST,
    Facts,
    Shard,
    clear_drafts,
    read_facts,
    read_shard,
    shard_path,
    write_manifest,
    write_shard,
)
from moec.runtime.distillation.stages import Stages
from moec.runtime.distillation.teacher import LiveTeacher
from moec.runtime.drafts import require_place
from moec.runtime.ranks import Ranks
from moec.runtime.rng import borrowed_rng
from moec.runtime.trainable import in_mode


@dataclass(frozen=True)
class StoredLessons:
    """What is in `folder`: shards of `facts` with all of `samples`. `computed`: samples that were new."""

    folder: Path
    facts: Facts
    samples: range
    computed: int

    @property
    def num_bytes(self) -> int:
        """What the shards with these samples take on disk."""
        return sum(shard_path(self.folder, first).stat().st_size for first in self.facts.firsts(self.samples))

    @property
    def bytes_per_token(self) -> float:
        """The same for each position of the samples in them, headers included."""
        shards = len(list(self.facts.firsts(self.samples)))
        return self.num_bytes / max(shards * self.facts.shard * self.facts.sequence, 1)


def samples_taught(train: Train, distill: Distill) -> range:
    """The samples of a run that its teacher has a say in: those of the steps until it falls silent."""
    return range(Stages(distill, train.steps).last * train.batch)


def store_lessons(
    teacher: LiveTeacher,
    data: TextData,
    seed: int,
    samples: range,
    folder: str | Path,
    *,
    batch: int = 8,
    shard: int = 256,
    shares: Literal["f32", "f16"] = "f32",
    console: Console | None = None,
) -> StoredLessons:
    """Have `teacher` speak of `samples` (positions of the run with `seed`), and keep its likeliest words.

    How many, at which temperature, and in which arithmetic says `teacher.distill`. Whole shards are stored:
    up to `shard - 1` samples more than asked for at either end. What is there already is checked and not
    computed again, so a job that was killed goes on where it was; for more samples, call it again. Every rank
    of the teacher's job calls it; each data rank reads `batch` sequences at once, and writes shards of its
    own. A run whose parts of a batch have as many on a rank learns from the same bits as of the teacher live.

    `shares="f16"` keeps two bytes of a share instead of four. Raises `PlanError` without `top_k`,
    `ArtifactError` for a folder of other lessons, of something else, or with a shard that is not whole.
    """
    ranks, root = teacher.ranks, Path(folder)
    facts = _facts(teacher, data, seed, batch, shard, shares)
    with ranks.together():
        if ranks.is_first:
            _open_folder(root, facts)
    missing = _missing(root, facts, samples, ranks)
    with borrowed_rng(ranks.device), _shown(console, ranks, len(missing) * shard, data.sequence) as advance:
        for first in range(0, len(missing), ranks.mesh.data):
            group = missing[first : first + ranks.mesh.data]
            told = _compute(teacher, data, facts, group, advance)
            with ranks.together():
                _write_own(root, facts, group, told, ranks)
    return StoredLessons(root, facts, samples, len(missing) * shard)


def _facts(
    teacher: LiveTeacher, data: TextData, seed: int, batch: int, shard: int, shares: Literal["f32", "f16"]
) -> Facts:
    distill = teacher.distill
    if distill.top_k is None:
        raise PlanError("distill.top_k", "left out", "how many words of each position to store", "top_k = 32")
    if batch < 1 or shard < 1:
        raise PlanError("store_lessons", f"batch = {batch}, shard = {shard}", "positive numbers")
    return Facts(
        teacher=teacher.identity(),
        data=data.fingerprint,
        seed=seed,
        sequence=data.sequence,
        vocabulary=_vocabulary(teacher, data.sequence),
        top_k=distill.top_k,
        temperature=distill.temperature,
        dtype=distill.dtype,
        shares=shares,
        shard=shard,
        batch=batch,
    )


def _vocabulary(teacher: LiveTeacher, sequence: int) -> int:
    """How many words the teacher knows; every rank calls it."""
    tokens = torch.zeros(1, sequence, dtype=torch.long, device=teacher.ranks.device)
    with torch.no_grad(), in_mode(teacher.program, training=False), borrowed_rng(teacher.ranks.device):
        return int(teacher.program(tokens).shape[-1])


def _open_folder(root: Path, facts: Facts) -> None:
    """Begin a folder, or go on with one of the same facts."""
    require_place(root, MANIFEST)
    root.mkdir(parents=True, exist_ok=True)
    clear_drafts(root)
    if not (root / MANIFEST).is_file():
        write_manifest(root, facts)
        return
    told = read_facts(root)
    for name, value in facts:
        found = getattr(told, name)
        if found != value:
            where = f"{root / MANIFEST} ({name})"
            raise ArtifactError(where, f"{name} {found}", f"{name} {value}", "a folder of its own")


def _missing(root: Path, facts: Facts, samples: range, ranks: Ranks) -> list[int]:
    """The first samples of shards that are not there. Those that are, the ranks read, each its share."""
    with ranks.together():
        there = [first for first in facts.firsts(samples) if shard_path(root, first).is_file()]
        for first in there[ranks.rank :: ranks.world]:
            read_shard(root, facts, first)
    known = set(ranks.gather(there)[0])
    return [first for first in facts.firsts(samples) if first not in known]


def _compute(
    teacher: LiveTeacher, data: TextData, facts: Facts, group: list[int], advance: Callable[[int], None]
) -> Shard:
    """The shard of this rank, one of `group`: the d-th is that of data rank d, or the last."""
    firsts = group + group[-1:] * (teacher.ranks.mesh.data - len(group))
    told: list[TopWords] = []
    for start in range(0, facts.shard, facts.batch):
        size = min(facts.batch, facts.shard - start)
        batches = [data.train_batch(facts.seed, first + start, size) for first in firsts]
        tokens, targets = (torch.cat(sides) for sides in zip(*batches, strict=True))
        said = teacher.lesson((tokens, targets), group[0] + start).told
        assert isinstance(said, TopWords)
        told.append(said)
        advance(size * len(group))
    words = torch.cat([said.words for said in told]).cpu().numpy()
    log_shares = torch.cat([said.log_shares for said in told]).cpu().numpy()
    return facts.packed(words, log_shares)


def _write_own(root: Path, facts: Facts, group: list[int], shard: Shard, ranks: Ranks) -> None:
    """The first rank of those that computed a shard writes it."""
    place = ranks.place_in_data
    if place < len(group) and ranks.mesh.coordinate(TENSOR, ranks.rank) == 0:
        write_shard(root, facts, group[place], shard)


@contextmanager
def _shown(
    console: Console | None, ranks: Ranks, total: int, sequence: int
) -> Iterator[Callable[[int], None]]:
    """What is to be called with numbers of samples as they are computed: moves a bar, where there is a
    terminal; at the end, a line."""
    screen = (console or Console()) if ranks.is_first else Console(quiet=True)
    columns = TextColumn("lessons"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn()
    began = time.perf_counter()
    with Progress(*columns, console=screen, disable=not screen.is_terminal) as bar:
        task = bar.add_task("lessons", total=total)
        yield lambda number: bar.update(task, advance=number)
    rate = total * sequence / max(time.perf_counter() - began, 1e-9)
    screen.print(f"{total:,} samples stored  {rate:,.0f} tokens/s", highlight=False)
