"""The memory of a decoder: keys and values of every attention, for a fixed number of rows and positions.

Allocated once; rows are written in place by `moec.remember`. A row that is finished gives its place to the
last one, so the rows in use are always the first ones and a step reads no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """One cached value. `shape`: its sizes for one row and one position (`shape[0]` rows of dim 0 belong to
    each row of the batch); `dim`: where the positions are."""

    name: str
    shape: tuple[int, ...]
    dim: int
    dtype: torch.dtype

    def sizes(self, rows: int, length: int) -> tuple[int, ...]:
        """Sizes for so many rows and positions."""
        return (self.shape[0] * rows, *self.shape[1 : self.dim], length, *self.shape[self.dim + 1 :])


class Cache:
    """`rows` × `length` positions of every slot, zeros at first; owned by whoever made it."""

    def __init__(self, slots: Sequence[Slot], rows: int, length: int, device: torch.device) -> None:
        self.slots, self.rows, self.length = tuple(slots), rows, length
        self.tensors = tuple(
            torch.zeros(slot.sizes(rows, length), dtype=slot.dtype, device=device) for slot in self.slots
        )

    def views(self, rows: int, length: int) -> tuple[Tensor, ...]:
        """The first `rows` rows and `length` positions of every slot, without copying."""
        return tuple(
            tensor.narrow(0, 0, slot.shape[0] * rows).narrow(slot.dim, 0, length)
            for slot, tensor in zip(self.slots, self.tensors, strict=True)
        )

    def part(self, first: int, rows: int) -> Cache:
        """`rows` rows from `first` on as a cache of their own, in the same memory."""
        made = copy(self)
        made.rows = rows
        made.tensors = tuple(
            tensor.narrow(0, slot.shape[0] * first, slot.shape[0] * rows)
            for slot, tensor in zip(self.slots, self.tensors, strict=True)
        )
        return made

    def move(self, source: int, target: int, used: int) -> None:
        """Copy the first `used` positions of row `source` over those of row `target`."""
        if source == target:
            return
        for slot, tensor in zip(self.slots, self.tensors, strict=True):
            per_row = slot.shape[0]
            rows = (tensor.narrow(0, row * per_row, per_row) for row in (source, target))
            old, new = (row.narrow(slot.dim, 0, used) for row in rows)
            new.copy_(old)

    def num_bytes(self) -> int:
        """Bytes of all slots."""
        return sum(tensor.nbytes for tensor in self.tensors)
