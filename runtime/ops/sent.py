"""What ranks send to each other: the kinds of traffic, amounts, and what a collective costs.

What a collective costs is the least that it has to send, as a ring does it:

    all_reduce              2·(n-1)/n of the tensor, in 2·(n-1) messages
    reduce_scatter_tensor   (n-1)/n of the tensor, in n-1 messages
    all_gather_into_tensor  the tensor n-1 times, in n-1 messages
    all_to_all_single       the rows for the others, one message to each that gets any
    broadcast               the tensor n-1 times from the root, in n-1 messages

A rank's own part of what it sends is not counted. The formulas compute with integers (`moec.runtime.traffic`,
which counts what runs) and with expressions (`moec.cost`, which reads a graph); a fraction of a byte is
dropped among integers and left in an expression.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .work import Amount

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

    calls: Amount = 0
    messages: Amount = 0
    bytes: Amount = 0

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


def all_reduce_cost(ranks: Amount, num_bytes: Amount) -> Sent:
    """One all_reduce of a tensor of `num_bytes`."""
    return Sent(1, 2 * (ranks - 1), _part(2 * (ranks - 1) * num_bytes, ranks))


def all_gather_cost(ranks: Amount, num_bytes: Amount) -> Sent:
    """One all_gather of a part of `num_bytes`."""
    return Sent(1, ranks - 1, (ranks - 1) * num_bytes)


def reduce_scatter_cost(ranks: Amount, num_bytes: Amount) -> Sent:
    """One reduce_scatter of a tensor of `num_bytes`, all parts together."""
    return Sent(1, ranks - 1, _part((ranks - 1) * num_bytes, ranks))


def _part(amount: Amount, ranks: Amount) -> Amount:
    """One of `ranks` parts."""
    return amount // ranks if isinstance(amount, int) and isinstance(ranks, int) else amount / ranks


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
