"""Which stretch of rows each program of a grouped product works on.

The rows of expert e are cut into tiles of `height` rows; the last one may be shorter. Dropped rows, which
stand after those of all experts, have tiles of their own, marked with expert E: a product stores zeros there.
How many tiles there are is known only on the device: the table has room for the most there can be, and the
entries beyond are marked with expert -1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moec.runtime.ops.triton.launch import launch, power_of_two

_BLOCK = 32


@dataclass(frozen=True)
class Tiles:
    """`table` i32 [3, most]: expert, first row, end of the rows. `height`: rows in a full tile."""

    table: Tensor
    height: int

    @property
    def most(self) -> int:
        """The number of entries in the table."""
        return self.table.shape[1]


def most_tiles(num_rows: int, num_experts: int, height: int) -> int:
    """The most tiles that `num_rows` rows of `num_experts` experts, and dropped ones, can need."""
    return num_rows // height + min(num_experts + 1, num_rows)


def cut(counts: Tensor, num_rows: int, height: int) -> Tiles:
    """The tiles of rows sorted by expert; counts i64 [E] stays where it is."""
    experts = counts.shape[0]
    most = most_tiles(num_rows, experts, height)
    table = torch.empty(3, most, dtype=torch.int32, device=counts.device)
    grid = (triton.cdiv(most, _BLOCK),)
    groups = power_of_two(experts + 1, 2)
    launch(_cut, grid, counts, table, num_rows, experts, most, height, groups, _BLOCK, num_warps=4)
    return Tiles(table, height)


@triton.jit(do_not_specialize=["num_rows", "experts", "most"])
def _cut(
    counts, table, num_rows, experts, most, HEIGHT: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    group = tl.arange(0, GROUPS)
    count = tl.load(counts + group, mask=group < experts, other=0).to(tl.int32)
    # The dropped rows are one more group.
    count = tl.where(group == experts, num_rows - tl.sum(count, 0), count)
    tiles = (count + HEIGHT - 1) // HEIGHT
    tile_ends = tl.cumsum(tiles, 0)
    row_ends = tl.cumsum(count, 0)
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    owner = tl.sum((tile_ends[None, :] <= tile[:, None]).to(tl.int32), 1)
    mine = group[None, :] == owner[:, None]
    first_tile = tl.sum(tl.where(mine, (tile_ends - tiles)[None, :], 0), 1)
    first_row = tl.sum(tl.where(mine, (row_ends - count)[None, :], 0), 1)
    end = tl.sum(tl.where(mine, row_ends[None, :], 0), 1)
    start = first_row + (tile - first_tile) * HEIGHT
    inside = tile < most
    tl.store(table + tile, tl.where(owner < GROUPS, owner, -1), mask=inside)
    tl.store(table + most + tile, start, mask=inside)
    tl.store(table + 2 * most + tile, tl.minimum(end, start + HEIGHT), mask=inside)


@triton.jit
def tile_of(counts, experts, num_rows, tile, HEIGHT: tl.constexpr, GROUPS: tl.constexpr):
    """(expert, first row, number of rows) of one tile, without a table: for a few tokens, where starting one
    more kernel takes longer than every program's own look at the counts. No rows: there is no such tile."""
    group = tl.arange(0, GROUPS)
    count = tl.load(counts + group, mask=group < experts, other=0).to(tl.int32)
    count = tl.where(group == experts, num_rows - tl.sum(count, 0), count)
    tiles = (count + HEIGHT - 1) // HEIGHT
    ends = tl.cumsum(tiles, 0)
    owner = tl.sum((ends <= tile).to(tl.int32), 0)
    mine = group == owner
    into = (tile - tl.sum(tl.where(mine, ends - tiles, 0), 0)) * HEIGHT
    start = tl.sum(tl.where(mine, tl.cumsum(count, 0) - count, 0), 0)
    return owner, start + into, tl.sum(tl.where(mine, count, 0), 0) - into
