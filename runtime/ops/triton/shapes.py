"""How large the tiles of a product are, by what it multiplies: one small table, and the reasons.

`height` rows by `width` columns of the result, `depth` of the summed dim a step; `warps` and `stages` (steps
loaded ahead) as Triton names them; `group`: tiles that share columns before the next columns are taken, so
that weights stay in the L2 cache.

*16 bits.* A warp group of Hopper multiplies 64 rows by up to 256 columns; two of them and 256 columns of
float32 sums (128 with two leaves, whose sums are kept side by side) fill the registers without spilling, and
four stages of such tiles fit into 227 KB (five of `outer`, which must load row
numbers first). Lower tiles where experts have few rows: a tile of 128 rows with
20 filled wastes five sixths of its products. *32 bits* without TF32 is multiplied by the ordinary units,
where 64 × 64 is large enough. *decode*: rows are few and the time is that of reading weights, so many narrow
programs with deep steps keep the memory busy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from moec.runtime.ops.triton.launch import SIXTEEN_BITS, power_of_two

HOPPER = 227 * 1024  # shared memory of an H100 that one program can have
KINDS = ("rows", "outer", "decode")


@dataclass(frozen=True)
class Shape:
    """The sizes of one launch; see the table."""

    height: int
    width: int
    depth: int
    warps: int
    stages: int
    group: int = 8

    @property
    def options(self) -> dict[str, Any]:
        """What Triton's launcher takes."""
        return {"num_warps": self.warps, "num_stages": self.stages}


# (kind, 16 bits, leaves beyond one) -> shape for tall stretches of rows
_TABLE = {
    ("rows", True, False): Shape(128, 256, 64, 8, 4),
    ("rows", True, True): Shape(128, 128, 64, 8, 4),
    ("rows", False, False): Shape(64, 64, 32, 4, 3),
    ("rows", False, True): Shape(64, 64, 16, 8, 3),
    ("outer", True, False): Shape(128, 256, 64, 8, 5),
    ("outer", False, False): Shape(64, 64, 32, 4, 3),
    ("decode", True, False): Shape(16, 16, 512, 4, 3),
    ("decode", True, True): Shape(16, 16, 256, 4, 3),
    ("decode", False, False): Shape(16, 16, 256, 4, 2),
    ("decode", False, True): Shape(16, 16, 128, 4, 2),
}


def shared_memory(device: torch.device) -> int:
    """Bytes that a program can have on one processor; an H100's, where there is no GPU to ask."""
    if device.type != "cuda":
        return HOPPER
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)  # type: ignore[attr-defined]


def shape_for(
    kind: str,
    dtype: torch.dtype,
    rows_per_expert: int,
    width: int,
    depth: int,
    leaves: int = 1,
    memory: int = HOPPER,
) -> Shape:
    """The entry of the table, no larger than the product needs, and with no more stages than `memory` holds.

    `rows_per_expert`: on average; of `outer`, the first dim of the result instead.
    """
    entry = _TABLE[kind, dtype in SIXTEEN_BITS, leaves > 1]
    height = min(entry.height, power_of_two(rows_per_expert, 16))
    columns = min(max(16, entry.width // (2 if leaves > 2 else 1)), power_of_two(width, 16))
    # Small tiles have no work for many warps: 4096 elements of the result each keep one warp group busy.
    warps = entry.warps if height * columns >= 64 * 128 else min(entry.warps, 4)
    step = min(entry.depth, power_of_two(depth, 16))
    loaded = (height + leaves * columns) * step * dtype.itemsize
    stages = max(1, min(entry.stages, memory // loaded + (kind == "outer")))
    return Shape(height, columns, step, warps, stages, entry.group)


@contextmanager
def instead(kind: str, dtype: torch.dtype, several_leaves: bool, shape: Shape) -> Iterator[None]:
    """Inside, another entry of the table, for whoever measures which is the best."""
    key = (kind, dtype in SIXTEEN_BITS, several_leaves)
    before = _TABLE[key]
    _TABLE[key] = shape
    try:
        yield
    finally:
        _TABLE[key] = before


def splits_for(programs: int, depth: int, step: int, processors: int) -> int:
    """Into how many parts a decode kernel cuts the summed dim: until there are some four programs a
    processor."""
    most = max(1, depth // (2 * step))
    wanted = -(-4 * processors // max(programs, 1))
    return power_of_two(min(most, wanted, 8) // 2 + 1) if min(most, wanted) > 1 else 1
