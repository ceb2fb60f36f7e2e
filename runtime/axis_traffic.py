"""What a rank sends along each axis, counted as process groups are asked for it.

    with counted_axes(axes) as sent:
        step()
    sent["expert_4"]        # Sent(calls, messages, bytes)

The same amounts as those of `count_traffic` (what a collective costs is in `moec.runtime.ops.sent`), told
apart by axis alone. That one sees every operator of a graph that runs eagerly; this one sees a call of a
group, whoever makes it, so nothing else is slower and a compiled program is counted as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor

from moec.runtime.ops.sent import (
    Sent,
    all_gather_cost,
    all_reduce_cost,
    all_to_all_cost,
    broadcast_cost,
    reduce_scatter_cost,
)
from moec.runtime.wrapped_groups import OPERATIONS, wrapped_axes


@contextmanager
def counted_axes(axes: Iterable[str]) -> Iterator[dict[str, Sent]]:
    """Count what this rank sends along `axes` inside; an axis that nothing went along has zeros."""
    counted: dict[str, Sent] = {axis: Sent() for axis in axes}

    def count(group: dist.ProcessGroup, axis: str, method: str, given: Sequence[Any]) -> None:
        counted[axis] += sent_by(group, method, given)

    with wrapped_axes(counted, count):
        yield counted


def sent_by(group: dist.ProcessGroup, method: str, given: Sequence[Any]) -> Sent:
    """What the call `method(*given)` of a process group sends from this rank; nothing for a barrier."""
    ranks, place, operation = group.size(), group.rank(), OPERATIONS[method]
    if operation == "all_to_all":
        return _all_to_all(ranks, place, method, given)
    if operation == "broadcast":
        root = given[1].rootRank if len(given) > 1 and given[1] is not None else 0
        return _summed(broadcast_cost(ranks, place, root, size) for size in _sizes(given[0]))
    if operation == "send":
        return _summed(Sent(1, 1, size) for size in _sizes(given[0]))
    cost = _COSTS.get(operation)
    if cost is None:  # barrier, receive
        return Sent()
    inputs = given[0] if operation == "all_reduce" else given[1]
    return _summed(cost(ranks, size) for size in _sizes(inputs))


_COSTS = {
    "all_reduce": all_reduce_cost,
    "all_gather": all_gather_cost,
    "reduce_scatter": reduce_scatter_cost,
}


def _all_to_all(ranks: int, place: int, method: str, given: Sequence[Any]) -> Sent:
    """Of lists of tensors, one a rank, or of one tensor whose rows are dealt out, equally unless told."""
    if method == "alltoall":
        return all_to_all_cost(place, _sizes(given[1]), 1)
    rows = list(given[3]) if len(given) > 3 and given[3] else [1] * ranks
    return all_to_all_cost(place, rows, _bytes(given[1]) // max(sum(rows), 1))


def _sizes(tensors: Any) -> list[int]:
    """The bytes of a tensor, of each of several, or of each list of tensors (the parts for the ranks)."""
    if isinstance(tensors, Tensor):
        return [_bytes(tensors)]
    return [_bytes(one) if isinstance(one, Tensor) else sum(map(_bytes, one)) for one in tensors]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _summed(parts: Iterable[Sent]) -> Sent:
    return sum(parts, Sent())
