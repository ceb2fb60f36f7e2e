"""What a rank sends to other ranks: counted while a program runs.

    with count_traffic() as traffic:
        local.loss(tokens).backward()
    print(traffic.sent)       # (direction, axis, operator) → calls, messages, bytes

Counted are the collectives of graphs (`_c10d_functional.*`) as they are called, those inside a kernel
(`moec.exchange` calls one, with sizes that are data) under the name of the operator around them. A rank's own
part of what it sends is not counted. What a collective costs is in `moec.runtime.ops.sent`.

`moec.cost.rank.counted_traffic` says the same of a graph that has not run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from moec.runtime.ops.groups import axis_rank, axis_size
from moec.runtime.ops.sent import BACKWARD, COSTS, FORWARD, Kind, Traffic

# Which result of an operator that chooses experts are the rows kept for each.
_COUNTS = {"assign": 1, "admit": 1, "gate": 4}


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count what this rank sends inside, in the forward and the backward direction.

    Backward is what runs inside autograd's engine; a forward that is computed again there counts as such.
    """
    traffic = Traffic()
    with _Count(traffic):
        yield traffic


class _Count(TorchDispatchMode):
    """Sees every operator below autograd, and those that kernels of `moec` operators call."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self._traffic = traffic
        self._around = ""

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "moec":
            inside = _takes_axis(func)
            result = self._look_inside(func, args, kwargs) if inside else func(*args, **kwargs)
            if func._opname in _COUNTS and _direction() == FORWARD:
                self._traffic.routed.append(result[_COUNTS[func._opname]].clone())
            return result
        if func.namespace == "_c10d_functional" and func._opname in COSTS:
            self._count(func, {**_named(func, args), **kwargs})
        return func(*args, **kwargs)

    def _look_inside(self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run the kernel with this mode on, so that its collectives are seen too."""
        outer, self._around = self._around, self._around or _name(func)
        try:
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        finally:
            self._around = outer

    def _count(self, func: OpOverload, named: Mapping[str, Any]) -> None:
        axis, tensor = str(named["group_name"]), named["input"]
        ranks, place = axis_size(axis), axis_rank(axis)
        sent = COSTS[func._opname](ranks, place, tensor.numel() * tensor.itemsize, named)
        self._traffic.add(Kind(_direction(), axis, self._around or _name(func)), sent)


def _direction() -> str:
    return FORWARD if torch._C._current_graph_task_id() == -1 else BACKWARD


def _takes_axis(func: OpOverload) -> bool:
    return any(argument.name == "axis" for argument in func._schema.arguments)


def _named(func: OpOverload, args: Sequence[Any]) -> dict[str, Any]:
    return {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}


def _name(func: OpOverload) -> str:
    """`moec.exchange`; `all_reduce` for a collective of torch."""
    return f"moec.{func._opname}" if func.namespace == "moec" else func._opname
