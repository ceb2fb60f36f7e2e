"""The collectives that programs send by, and who sends to whom in each of them."""

from __future__ import annotations

from typing import Literal

Algorithm = Literal["ring", "tree", "direct"]

REDUCE, GATHER, DIRECT = "reduce", "gather", "direct"

PATTERNS = {
    "all_reduce": REDUCE,
    "moec.cross_entropy_part_totals": REDUCE,
    "moec.cross_entropy_part_back": REDUCE,
    "moec.divergence_totals": REDUCE,
    "moec.divergence_back": REDUCE,
    "moec.divergence_top_totals": REDUCE,
    "moec.divergence_top_back": REDUCE,
    "all_gather_into_tensor": GATHER,
    "reduce_scatter_tensor": GATHER,
    "broadcast": GATHER,
    "moec.unshare": GATHER,
    "moec.sum_share": GATHER,
    "moec.gather_vocabulary": GATHER,
    "moec.sum_vocabulary": GATHER,
    "all_to_all_single": DIRECT,
    "moec.exchange": DIRECT,
    "moec.gather_rows": DIRECT,
    "moec.scatter_rows": DIRECT,
}
"""Collective, as traffic names it → who sends to whom."""

ALGORITHMS: dict[str, tuple[Algorithm, ...]] = {
    REDUCE: ("ring", "tree"),
    GATHER: ("ring",),
    DIRECT: ("direct",),
}
"""How each of them can go."""
