"""Collectives among threads of one process, which lay their tensors on one table.

Each collective is a meeting. Whoever comes first lays down its part and pauses; the last one does the copying
for all and wakes them. Parts that do not match (another collective, shape, dtype, split) are an error that
names both ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moec.errors import MeshError
from moec.runtime.turns import Turns, ranks_named


@dataclass(frozen=True)
class Part:
    """What one rank brings to a collective: `given` is read, `taken` written.

    `terms` have to be equal on every rank; `sends` and `receives` are the rows per rank of an all-to-all.
    """

    kind: str
    terms: tuple[object, ...]
    given: tuple[Tensor, ...]
    taken: tuple[Tensor, ...]
    sends: tuple[int, ...] = ()
    receives: tuple[int, ...] = ()

    def __str__(self) -> str:
        tensors = ", ".join(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in self.given)
        sizes = f", sends {list(self.sends)}, receives {list(self.receives)}" if self.sends else ""
        terms = "".join(f", {term}" for term in self.terms if isinstance(term, str))
        return f"{self.kind}({tensors}{sizes}{terms})"


@dataclass
class Meetings:
    """The collectives that are under way: (axis, its ranks) → the parts that are there, by rank."""

    turns: Turns
    open: dict[tuple[str, tuple[int, ...]], dict[int, Part]] = field(default_factory=dict)

    def meet(self, axis: str, ranks: tuple[int, ...], rank: int, part: Part) -> None:
        """Take part in the next collective of the group; back when it is done."""
        table = self.open.setdefault((axis, ranks), {})
        for other, theirs in table.items():
            if (theirs.kind, theirs.terms) != (part.kind, part.terms):
                found = f"{part} where rank {other} has {theirs}"
                raise MeshError(f"rank {rank}, axis {axis}", found, "the same collective on every rank")
        table[rank] = part
        if len(table) < len(ranks):
            self.turns.pause(rank, lambda: _missing(axis, ranks, table, part))
            return
        del self.open[axis, ranks]
        with torch.no_grad():
            _COLLECTIVES[part.kind](axis, ranks, [table[other] for other in ranks])
        for other in ranks:
            self.turns.wake(other)


def _missing(axis: str, ranks: tuple[int, ...], table: dict[int, Part], part: Part) -> str:
    return f"{ranks_named(set(ranks) - table.keys())} to enter {part} over axis {axis}"


_SUMS: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    dist.ReduceOp.SUM: torch.add,
    dist.ReduceOp.AVG: torch.add,
    dist.ReduceOp.PRODUCT: torch.mul,
    dist.ReduceOp.MIN: torch.minimum,
    dist.ReduceOp.MAX: torch.maximum,
}


def _reduced(op: str, tensors: Sequence[Tensor]) -> Tensor:
    """All tensors in one, in the order of the ranks; a new tensor."""
    kind = getattr(dist.ReduceOp, op)
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total = _SUMS[kind](total, tensor)
    return total / len(tensors) if kind == dist.ReduceOp.AVG else total


def _all_reduce(axis: str, ranks: tuple[int, ...], parts: Sequence[Part]) -> None:
    total = _reduced(str(parts[0].terms[0]), [part.given[0] for part in parts])
    for part in parts:
        part.taken[0].copy_(total)


def _reduce_scatter(axis: str, ranks: tuple[int, ...], parts: Sequence[Part]) -> None:
    for place, part in enumerate(parts):
        part.taken[0].copy_(_reduced(str(part.terms[0]), [other.given[place] for other in parts]))


def _all_gather(axis: str, ranks: tuple[int, ...], parts: Sequence[Part]) -> None:
    for part in parts:
        for target, other in zip(part.taken, parts, strict=True):
            target.copy_(other.given[0])


def _broadcast(axis: str, ranks: tuple[int, ...], parts: Sequence[Part]) -> None:
    root = parts[int(str(parts[0].terms[0]).removeprefix("root "))]
    for part in parts:
        if part is not root:
            part.taken[0].copy_(root.given[0])


def _all_to_all(axis: str, ranks: tuple[int, ...], parts: Sequence[Part]) -> None:
    for source, giver in enumerate(parts):
        for target, taker in enumerate(parts):
            if giver.sends[target] != taker.receives[source]:
                found = f"{giver.sends[target]} rows for rank {ranks[target]}, which expects"
                where = f"rank {ranks[source]}, axis {axis}, all_to_all"
                raise MeshError(where, f"{found} {taker.receives[source]}", "the same number on both sides")
    rows = [part.given[0].split(part.sends) for part in parts]
    for target, part in enumerate(parts):
        for source, box in enumerate(part.taken[0].split(part.receives)):
            box.copy_(rows[source][target])


def _nothing(axis: str, ranks: tuple[int, ...], parts: Sequence[Part]) -> None:
    """A barrier moves nothing."""


_COLLECTIVES: dict[str, Callable[[str, tuple[int, ...], Sequence[Part]], None]] = {
    "all_reduce": _all_reduce,
    "reduce_scatter": _reduce_scatter,
    "all_gather": _all_gather,
    "broadcast": _broadcast,
    "all_to_all": _all_to_all,
    "barrier": _nothing,
}


def sum_name(op: dist.ReduceOp) -> str:
    """`SUM`, for one of the sums that there are; `MeshError` for another."""
    for kind in _SUMS:
        if op == kind:
            return str(kind).rpartition(".")[2]
    raise MeshError("collective", f"the sum {op}", "SUM, AVG, PRODUCT, MIN or MAX")
