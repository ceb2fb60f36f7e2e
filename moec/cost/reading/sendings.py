"""What collectives send, as expressions; `moec.runtime.ops.sent` says what each costs.

Of a routing that is known in the mean, rows go to every rank of the axis alike; of one that was counted, to
each as many as went.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import sympy

from moec.cost.operation import Sending
from moec.cost.reading.call import GraphCall
from moec.cost.reading.rows import CountedTable
from moec.cost.reading.tables import table_in
from moec.cost.symbols import symbol
from moec.ir.mesh import Mesh
from moec.runtime.ops.sent import (
    Sent,
    all_gather_cost,
    all_reduce_cost,
    all_to_all_cost,
    reduce_scatter_cost,
)
from moec.runtime.ops.work import Amount

Both = tuple[Sending | None, Sending | None]


@dataclass(frozen=True)
class Collective:
    """One call of an operator that sends along `axis`, on the rank at `place`; `ranks`: the letter of the
    axis."""

    call: GraphCall
    axis: str
    place: int

    @property
    def ranks(self) -> sympy.Symbol:
        """How many there are along the axis."""
        return symbol(self.axis)

    def sending(self, operator: str, sent: Sent) -> Sending:
        """What was sent, under the name that `moec.runtime.traffic` has for it."""
        return Sending(self.axis, operator, sent.messages, sent.bytes, sent.calls)

    def row_bytes(self, name: str) -> int:
        """The bytes of a row of an argument [N, D]: what is computed in is whole on every rank."""
        return int(self.call.shape(name)[1]) * self.call.itemsize(name)

    def exchanged(self, name: str, row_bytes: Amount) -> Sent:
        """What it costs to send rows as the table in the argument `name` says."""
        table = table_in(self.call, name)
        if isinstance(table, CountedTable):
            return all_to_all_cost(self.place, table.here, row_bytes)
        return Sent(1, self.ranks - 1, (self.ranks - 1) * table.rows * row_bytes / self.ranks)


def sendings(operator: str, call: GraphCall, mesh: Mesh, rank: int) -> Both:
    """(forward, backward) of one call on `rank`; (None, None) for an operator that sends nothing."""
    rule = _RULES.get(operator)
    if rule is None:
        return None, None
    axis = str(call.arguments.get("axis") or call.arguments.get("group_name"))
    return rule(Collective(call, axis, mesh.coordinate(axis, rank)))


def _all_reduce(one: Collective) -> Both:
    sent = one.sending("all_reduce", all_reduce_cost(one.ranks, one.call.bytes("input")))
    return sent, sent


def _all_gather(one: Collective) -> Both:
    part = one.call.bytes("input")
    there = one.sending("all_gather_into_tensor", all_gather_cost(one.ranks, part))
    return there, one.sending("reduce_scatter_tensor", reduce_scatter_cost(one.ranks, part * one.ranks))


def _reduce_scatter(one: Collective) -> Both:
    whole = one.call.bytes("input")
    there = one.sending("reduce_scatter_tensor", reduce_scatter_cost(one.ranks, whole))
    return there, one.sending("all_gather_into_tensor", all_gather_cost(one.ranks, whole / one.ranks))


def _all_to_all(one: Collective) -> Both:
    """Of equal parts: the only ones that stand in a graph are those of counts."""
    sent = Sent(1, one.ranks - 1, (one.ranks - 1) * one.call.bytes("input") / one.ranks)
    return (one.sending("all_to_all_single", sent),) * 2


def _exchange(one: Collective) -> Both:
    row = one.row_bytes("rows")
    there, back = (one.sending("moec.exchange", one.exchanged(name, row)) for name in ("send", "receive"))
    return there, back


def _gather_rows(one: Collective) -> Both:
    row, table = one.row_bytes("rows"), table_in(one.call, "sizes")
    back = one.exchanged("sizes", row)
    there = back
    if isinstance(table, CountedTable):
        there = all_to_all_cost(one.place, [table.here[one.place]] * len(table.here), row)
    return one.sending("moec.gather_rows", there), one.sending("moec.scatter_rows", back)


def _scatter_rows(one: Collective) -> Both:
    there, back = _gather_rows(one)
    return back, there


def _unshare(one: Collective) -> Both:
    longest = sympy.ceiling(one.call.value("num_rows") / one.ranks) * one.row_bytes("y")
    there = one.sending("moec.unshare", all_gather_cost(one.ranks, longest))
    return there, one.sending("moec.sum_share", reduce_scatter_cost(one.ranks, longest * one.ranks))


def _gather_vocabulary(one: Collective) -> Both:
    """The parts are padded to the longest."""
    *rows, _ = one.call.shape("logits")
    words = sympy.ceiling(sympy.Integer(one.call.value("num_classes")) / one.ranks)
    longest = sympy.prod(rows) * words * one.call.itemsize("logits")
    there = one.sending("moec.gather_vocabulary", all_gather_cost(one.ranks, longest))
    return there, one.sending("moec.sum_vocabulary", reduce_scatter_cost(one.ranks, longest * one.ranks))


_RULES: dict[str, Callable[[Collective], Both]] = {
    "_c10d_functional::all_reduce": _all_reduce,
    "_c10d_functional::all_gather_into_tensor": _all_gather,
    "_c10d_functional::reduce_scatter_tensor": _reduce_scatter,
    "_c10d_functional::all_to_all_single": _all_to_all,
    "moec::exchange": _exchange,
    "moec::gather_rows": _gather_rows,
    "moec::scatter_rows": _scatter_rows,
    "moec::unshare": _unshare,
    "moec::gather_vocabulary": _gather_vocabulary,
}

SENDERS = frozenset(_RULES)
"""The operators that send something."""
