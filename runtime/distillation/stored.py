"""A teacher that has spoken already: its lessons are read from disk.

Legend: B sequences of this rank, S sequence, K likeliest words.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moec.errors import ArtifactError, PlanError
from moec.plan import Distill
from moec.runtime.data import Batch, TextData
from moec.runtime.distillation.lesson import Lesson, TopWords
from moec.runtime.distillation.lesson_files import (
    MANIFEST,
    Shard,
    read_facts,
    read_shard,
    require_shard,
    stored_firsts,
)
from moec.runtime.ranks import ALONE, Ranks

_HELD = 2  # shards in memory: the stretch of a rank may begin in one and end in the next


class StoredTeacher:
    """The lessons in `folder` (see `store_lessons`) of the run on `data` with `seed`, on the student's ranks.

    It may say fewer words than were stored. Everything that can be known is checked here: that these are
    lessons on this text with this seed and temperature, of `teacher` (an identity) and `vocabulary` words
    where these are given, that no shard of `samples` (default: of those that are there) is missing, foreign
    or cut short. Raises `PlanError` for a `distill` that stored lessons cannot serve, else `ArtifactError`. A
    shard's bytes are checked when it is first read. Every rank makes one, and reads its own samples alone.
    """

    def __init__(
        self,
        folder: str | Path,
        distill: Distill,
        data: TextData,
        seed: int,
        ranks: Ranks = ALONE,
        *,
        samples: range | None = None,
        teacher: Mapping[str, Any] | None = None,
        vocabulary: int | None = None,
    ) -> None:
        self.folder, self.distill, self.ranks = Path(folder), distill, ranks
        self._held: dict[int, Shard] = {}
        with ranks.together():
            self.facts = read_facts(self.folder)
            self._require_settings()
            self._require_same("data", data.fingerprint)
            self._require_same("sequence", data.sequence)
            self._require_same("seed", seed)
            if vocabulary is not None:
                self._require_same("vocabulary", vocabulary)
            self._require_teacher(teacher or {})
            self._require_shards(samples)

    def identity(self) -> dict[str, Any]:
        """The teacher's, and which of its lessons these are."""
        return {**self.facts.teacher, "stored": self.facts.digest}

    def lesson(self, batch: Batch, position: int) -> Lesson:
        """See `moec.runtime.distillation.teacher.Teacher`."""
        mine = np.array_split(np.arange(position, position + len(batch[0])), self.ranks.mesh.data)
        words, log_shares = self._read(mine[self.ranks.place_in_data])
        device = self.ranks.device
        told = TopWords(
            torch.from_numpy(words.astype(np.int64)).to(device),
            torch.from_numpy(log_shares.astype(np.float32)).to(device),
        )
        return Lesson(told, self.distill)

    def _read(self, samples_B: np.ndarray[Any, Any]) -> Shard:
        """Words and log shares `[B, S, K]` of some samples in a row."""
        size, k = self.facts.shard, self.distill.top_k
        parts = []
        for first in np.unique(samples_B - samples_B % size):
            own = samples_B[(samples_B >= first) & (samples_B < first + size)] - first
            parts.append([side[own[0] : own[-1] + 1, :, :k] for side in self._shard(int(first))])
        if not parts:
            return np.empty((0, self.facts.sequence, k or 0)), np.empty((0, self.facts.sequence, k or 0))
        words, log_shares = (np.concatenate(sides) for sides in zip(*parts, strict=True))
        return words, log_shares

    def _shard(self, first: int) -> Shard:
        if first not in self._held:
            read = read_shard(self.folder, self.facts, first)
            while len(self._held) >= _HELD:
                self._held.pop(min(self._held))
            self._held[first] = read
        return self._held[first]

    def _require_settings(self) -> None:
        distill, facts = self.distill, self.facts
        if distill.hidden > 0:
            found = f"hidden = {distill.hidden} with stored lessons, which hold words alone"
            raise PlanError("distill.hidden", found, "hidden = 0, or a teacher that is run")
        if distill.top_k is None or distill.top_k > facts.top_k:
            found = f"{distill.top_k or 'left out: all words'}, and {facts.top_k} are stored in {self.folder}"
            raise PlanError("distill.top_k", found, f"at most {facts.top_k}", f"top_k = {facts.top_k}")
        for name in ("temperature", "dtype"):
            asked, stored = getattr(distill, name), getattr(facts, name)
            if asked != stored:
                found = f"{asked}, and lessons in {self.folder} that were stored with {stored}"
                raise PlanError(f"distill.{name}", found, f"{stored}, or lessons stored anew")

    def _require_same(self, name: str, needed: object) -> None:
        found = getattr(self.facts, name)
        if found != needed:
            where = f"{self.folder / MANIFEST} ({name})"
            raise ArtifactError(where, f"lessons with {name} {found}", f"{name} {needed}, that of this run")

    def _require_teacher(self, teacher: Mapping[str, Any]) -> None:
        """A program in memory and the same one on disk have identities of other words: what both tell must
        agree."""
        for name in teacher.keys() & self.facts.teacher.keys():
            if teacher[name] != self.facts.teacher[name]:
                where = f"{self.folder / MANIFEST} (teacher)"
                found = f"lessons of another teacher: {name} {self.facts.teacher[name]}"
                raise ArtifactError(where, found, f"{name} {teacher[name]}")

    def _require_shards(self, samples: range | None) -> None:
        """Each rank looks at its share of the files."""
        firsts = list(stored_firsts(self.folder) if samples is None else self.facts.firsts(samples))
        for first in firsts[self.ranks.rank :: self.ranks.world]:
            require_shard(self.folder, self.facts, first)
