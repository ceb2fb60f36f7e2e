"""What a rank sends to other ranks: counted while a program runs.

    with count_traffic() as traffic:
        local.loss(tokens).backward()
    print(traffic.sent)       # (direction, axis, operator) → calls, messages, bytes

Counted are the collectives of graphs (`_c10d_functional.*`) as they are called, those inside a kernel
(`moec.exchange` calls one, with sizes that are data) under the name of the operator around them. A rank's own
part of what it sends is not counted. What a collective costs is the least that it has to send, as a ring does
it:

    all_reduce              2·(n-1)/n of the tensor, in 2·(n-1) messages
    reduce_scatter_tensor   (n-1)/n of the tensor, in n-1 messages
    all_gather_into_tensor  the tensor n-1 times, in n-1 messages
    all_to_all_single       the rows for the others, one message to each that gets any
    broadcast               the tensor n-1 times from the root, in n-1 messages

`moec.runtime.predicted_traffic` says the same of a graph that has not run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from moec.runtime.ops.groups import axis_rank, axis_size

FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True, order=True)
class Kind:
    """What traffic is told apart by: `forward` or `backward`, the axis, the operator (`moec.exchange`)."""

    direction: str
    axis: str
    operator: str


@dataclass(frozen=True)
class Sent:
    """How often an operator was called, and what it sent to other ranks."""

    calls: int = 0
    messages: int = 0
    bytes: int = 0

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.calls + other.calls, self.messages + other.messages, self.bytes + other.bytes)


@dataclass
class Traffic:
    """The traffic of one rank, or of several added up.

    `routed`: the rows [E] that each expert layer sent to each expert, in the order in which the layers ran.
    """

    sent: dict[Kind, Sent] = field(default_factory=lambda: defaultdict(Sent))
    routed: list[Tensor] = field(default_factory=list)

    def add(self, kind: Kind, sent: Sent) -> None:
        """Count one more call."""
        self.sent[kind] = self.sent.get(kind, Sent()) + sent

    @property
    def total(self) -> Sent:
        """Everything together."""
        return sum(self.sent.values(), Sent())

    def to_json(self) -> list[list[Any]]:
        """`sent` as plain data; `of_json` reads it back."""
        rows = sorted(self.sent.items())
        return [
            [kind.direction, kind.axis, kind.operator, sent.calls, sent.messages, sent.bytes]
            for kind, sent in rows
        ]

    @classmethod
    def of_json(cls, rows: Sequence[Sequence[Any]]) -> Traffic:
        """The traffic that `to_json` wrote."""
        made = cls()
        for direction, axis, operator, *numbers in rows:
            made.add(Kind(direction, axis, operator), Sent(*numbers))
        return made


def summed(parts: Sequence[Traffic]) -> Traffic:
    """The traffic of several ranks together."""
    made = Traffic()
    for part in parts:
        for kind, sent in part.sent.items():
            made.add(kind, sent)
    return made


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
            if func._opname in ("admit", "assign") and _direction() == FORWARD:
                self._traffic.routed.append(result[1].clone())
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


def all_reduce_cost(ranks: int, num_bytes: int) -> Sent:
    """One all_reduce of a tensor of `num_bytes`."""
    return Sent(1, 2 * (ranks - 1), 2 * (ranks - 1) * num_bytes // ranks)


def all_gather_cost(ranks: int, num_bytes: int) -> Sent:
    """One all_gather of a part of `num_bytes`."""
    return Sent(1, ranks - 1, (ranks - 1) * num_bytes)


def reduce_scatter_cost(ranks: int, num_bytes: int) -> Sent:
    """One reduce_scatter of a tensor of `num_bytes`, all parts together."""
    return Sent(1, ranks - 1, (ranks - 1) * num_bytes // ranks)


def broadcast_cost(ranks: int, place: int, root: int, num_bytes: int) -> Sent:
    """One broadcast, as seen by the rank at `place`."""
    return Sent(1, ranks - 1, (ranks - 1) * num_bytes) if place == root else Sent(1)


def all_to_all_cost(place: int, rows: Sequence[int], row_bytes: int) -> Sent:
    """One exchange of `rows[i]` rows to rank i, as seen by the rank at `place`."""
    others = [count for index, count in enumerate(rows) if index != place]
    return Sent(1, sum(count * row_bytes > 0 for count in others), sum(others) * row_bytes)


def _exchange_cost(ranks: int, place: int, num_bytes: int, named: Mapping[str, Any]) -> Sent:
    rows = named["input_split_sizes"]
    return all_to_all_cost(place, rows, num_bytes // max(sum(rows), 1))


COSTS: dict[str, Callable[[int, int, int, Mapping[str, Any]], Sent]] = {
    "all_reduce": lambda ranks, place, num_bytes, named: all_reduce_cost(ranks, num_bytes),
    "all_gather_into_tensor": lambda ranks, place, num_bytes, named: all_gather_cost(ranks, num_bytes),
    "reduce_scatter_tensor": lambda ranks, place, num_bytes, named: reduce_scatter_cost(ranks, num_bytes),
    "broadcast": lambda ranks, place, num_bytes, named: broadcast_cost(ranks, place, named["src"], num_bytes),
    "all_to_all_single": _exchange_cost,
}
