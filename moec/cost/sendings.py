"""What collectives send, as expressions: the symbolic twin of `moec.cost.counted_traffic`.

Rows are those that a router that favours nobody sends: the same number to every rank of the axis.
"""

from __future__ import annotations

from collections.abc import Callable

import sympy

from .call import GraphCall
from .operation import Sending
from .symbols import symbol
from .value import Value

Both = tuple[Sending | None, Sending | None]


def sendings(operator: str, call: GraphCall) -> Both:
    """(forward, backward) of one call; (None, None) for an operator that sends nothing."""
    rule = _RULES.get(operator)
    if rule is None:
        return None, None
    axis = str(call.arguments.get("axis") or call.arguments.get("group_name"))
    return rule(call, axis, symbol(axis))


def _all_reduce(call: GraphCall, axis: str, ranks: sympy.Symbol) -> Both:
    sent = Sending(axis, "all_reduce", 2 * (ranks - 1), 2 * (ranks - 1) * call.bytes("input") / ranks)
    return sent, sent


def _all_gather(call: GraphCall, axis: str, ranks: sympy.Symbol) -> Both:
    part = call.bytes("input")
    there = Sending(axis, "all_gather_into_tensor", ranks - 1, (ranks - 1) * part)
    return there, Sending(axis, "reduce_scatter_tensor", ranks - 1, (ranks - 1) * part)


def _reduce_scatter(call: GraphCall, axis: str, ranks: sympy.Symbol) -> Both:
    whole = call.bytes("input")
    there = Sending(axis, "reduce_scatter_tensor", ranks - 1, (ranks - 1) * whole / ranks)
    return there, Sending(axis, "all_gather_into_tensor", ranks - 1, (ranks - 1) * whole / ranks)


def _all_to_all(call: GraphCall, axis: str, ranks: sympy.Symbol) -> Both:
    sent = Sending(axis, "all_to_all_single", ranks - 1, (ranks - 1) * call.bytes("input") / ranks)
    return sent, sent


def _exchange(call: GraphCall, axis: str, ranks: sympy.Symbol) -> Both:
    row = call.shape("rows")[1] * call.itemsize("rows")
    made = [
        Sending(axis, "moec.exchange", ranks - 1, (ranks - 1) * _rows(call, name) * row / ranks)
        for name in ("send", "receive")
    ]
    return made[0], made[1]


def _gather_rows(call: GraphCall, axis: str, ranks: sympy.Symbol) -> Both:
    row = call.shape("rows")[1] * call.itemsize("rows")
    sent = (ranks - 1) * _rows(call, "sizes") * row / ranks
    there = Sending(axis, "moec.gather_rows", ranks - 1, sent)
    return there, Sending(axis, "moec.scatter_rows", ranks - 1, sent)


def _scatter_rows(call: GraphCall, axis: str, ranks: sympy.Symbol) -> Both:
    there, back = _gather_rows(call, axis, ranks)
    return back, there


def _unshare(call: GraphCall, axis: str, ranks: sympy.Symbol) -> Both:
    longest = sympy.ceiling(call.value("num_rows") / ranks) * call.shape("y")[1] * call.itemsize("y")
    there = Sending(axis, "moec.unshare", ranks - 1, (ranks - 1) * longest)
    return there, Sending(axis, "moec.sum_share", ranks - 1, (ranks - 1) * longest)


def _rows(call: GraphCall, name: str) -> sympy.Expr:
    value = call.arguments[name]
    assert isinstance(value, Value)
    assert value.table is not None
    return value.table.rows


_RULES: dict[str, Callable[[GraphCall, str, sympy.Symbol], Both]] = {
    "_c10d_functional::all_reduce": _all_reduce,
    "_c10d_functional::all_gather_into_tensor": _all_gather,
    "_c10d_functional::reduce_scatter_tensor": _reduce_scatter,
    "_c10d_functional::all_to_all_single": _all_to_all,
    "moec::exchange": _exchange,
    "moec::gather_rows": _gather_rows,
    "moec::scatter_rows": _scatter_rows,
    "moec::unshare": _unshare,
}
