"""Lessons from the ranks of a teacher to the ranks of its student, where the two are arranged otherwise.

A teacher's rank has the logits of its own sequences and words; a student's rank needs those of others. Every
number that is needed elsewhere is sent there once, in one exchange among all ranks, and is what it was, bit
for bit. Who sends what follows from the two meshes and the size of the batch: no rank has to be told.

Legend: B sequences of the job's batch, B_i those of a rank, S positions, W the last dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moec.ir.mesh import WORLD
from moec.runtime.data import Batch
from moec.runtime.distillation.lesson import Lesson, TopWords
from moec.runtime.distillation.losses import Words
from moec.runtime.distillation.spread import Box, Parcels, Spread
from moec.runtime.distillation.teacher import LiveTeacher, Teacher
from moec.runtime.ops.sent import Sent, all_to_all_cost
from moec.runtime.ranks import Ranks, ranks_of
from moec.runtime.trainable import Trainable

_collectives = torch.ops._c10d_functional
_REMEMBERED = 16  # sizes of batches whose parcels are kept


def as_read_by(teacher: LiveTeacher, student: Trainable) -> Teacher:
    """`teacher`, whose lessons lie on ranks as the logits of `student` do.

    The teacher runs where it lies: on the student's mesh, on another over the same ranks (whose axes have
    names of their own, and are connected), or whole on every rank.
    """
    have = Spread.of(teacher.program, teacher.ranks)
    ranks = ranks_of(student)
    need = Spread.of(student, ranks)
    return teacher if have.is_like(need) else MovedTeacher(teacher, have, need, ranks)


@dataclass(frozen=True)
class MovedTeacher:
    """A teacher whose lessons lie on ranks as `have` says, and are handed over to lie as `need` says."""

    teacher: LiveTeacher
    have: Spread
    need: Spread
    ranks: Ranks

    @property
    def program(self) -> Trainable:
        """What is run: the teacher's."""
        return self.teacher.program

    def identity(self) -> dict[str, Any]:
        """That of the teacher: where it runs makes no other one of it."""
        return self.teacher.identity()

    def lesson(self, batch: Batch, position: int) -> Lesson:
        """See `Teacher`."""
        return handed_over(
            self.teacher.lesson(batch, position), len(batch[0]), self.have, self.need, self.ranks
        )


def handed_over(lesson: Lesson, sequences: int, have: Spread, need: Spread, ranks: Ranks) -> Lesson:
    """`lesson` on a batch of `sequences` sequences, brought from `have` to `need`; every rank calls it."""

    def moved(value: Tensor) -> Tensor:
        return move(value, parcels(have.undealt, need.undealt, ranks.rank, sequences, value.shape[-1]))

    told, hidden = lesson.told, {layer: moved(states) for layer, states in lesson.hidden.items()}
    if isinstance(told, TopWords):
        return replace(lesson, told=TopWords(moved(told.words), moved(told.log_shares)), hidden=hidden)
    width = Words.of(told.shape[-1], have.words).number
    return replace(lesson, told=move(told, parcels(have, need, ranks.rank, sequences, width)), hidden=hidden)


@lru_cache(_REMEMBERED)
def parcels(have: Spread, need: Spread, rank: int, sequences: int, width: int) -> Parcels:
    """`Parcels`, made once for the sizes of batches that a run has."""
    return Parcels(have, need, rank, sequences, width)


def move(value: Tensor, parcels: Parcels) -> Tensor:
    """`value` [B_i, S, W_i], which is what this rank has, as what it needs; a view where nothing travels.

    Every rank calls it, with a value of the same dtype and S.
    """
    held, needed = parcels.held(parcels.rank), parcels.needed(parcels.rank)
    if needed.size and not parcels.travels():
        return _cut(value, needed, held)
    made = value.new_empty(_long(needed.rows), value.shape[1], _long(needed.words))
    if not parcels.travels():
        return made
    sends, receives = (
        [box.size * value.shape[1] for box in side] for side in (parcels.sent, parcels.received)
    )
    leaving = torch.cat([_cut(value, box, held).reshape(-1) for box in parcels.sent])
    arrived = _collectives.wait_tensor(_collectives.all_to_all_single(leaving, receives, sends, WORLD))
    assert len(arrived) == made.numel(), f"{len(arrived)} of {made.numel()} numbers came"
    for box, part in zip(parcels.received, arrived.split(receives), strict=True):
        place = _cut(made, box, needed)
        place.copy_(part.view(place.shape))
    return made


def traffic_of_move(parcels: Parcels, length: int, itemsize: int) -> Sent:
    """What this rank sends in one `move` of a value [B_i, `length`, W_i] of `itemsize` bytes a number."""
    if not parcels.travels():
        return Sent()
    return all_to_all_cost(parcels.rank, [box.size * length for box in parcels.sent], itemsize)


def _cut(value: Tensor, box: Box, outer: Box) -> Tensor:
    """The part `box` of a tensor that holds `outer`, a view."""
    rows, words = box.inside(outer)
    return value[rows, :, words]


def _long(span: tuple[int, int]) -> int:
    return span[1] - span[0]
