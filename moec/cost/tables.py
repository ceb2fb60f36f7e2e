"""What becomes of tables of counts, and of the number of rows, as a graph passes them on."""

from __future__ import annotations

import math

import sympy

from .call import GraphCall
from .symbols import symbol
from .value import Table, Value


def drawn(call: GraphCall, top_k: int, experts: int, tokens: sympy.Expr) -> Table:
    """The table that a router makes of `tokens` tokens here.

    With capacity, what is kept in the mean: the least of what came and what the experts take.
    """
    rows, factor = tokens * top_k, float(call.value("capacity_factor"))
    if not call.training:
        factor = float(call.value("eval_capacity_factor")) or factor
    kept = rows if factor == 0 else sympy.Min(1, sympy.nsimplify(factor)) * rows
    return Table(kept, tokens, top_k, experts)


def table_of(name: str, call: GraphCall) -> Table | None:
    """The table among the results of operator `name`, from those of its operands."""
    found = [value.table for value in call.arguments.values() if isinstance(value, Value) and value.table]
    if not found:
        return None
    table = found[0]
    axis = call.arguments.get("group_name")
    if name == "_c10d_functional::all_to_all_single":
        return table.arrived(symbol(str(axis)))
    if name in ("_c10d_functional::all_gather_into_tensor", "_c10d_functional::all_reduce"):
        return table.of_ranks(symbol(str(axis)))
    return table


def rows_of(name: str, call: GraphCall) -> sympy.Expr | None:
    """The number of rows of a result whose size is data."""
    if name == "moec::share":
        return math.prod(call.shape("x")[:1]) / symbol(call.value("axis"))
    if name == "moec::exchange":
        return _rows(call, "receive")
    if name == "moec::gather_rows":
        return _rows(call, "sizes")
    if name == "moec::scatter_rows":
        return _rows(call, "sizes") / symbol(call.value("axis"))
    return None


def _rows(call: GraphCall, name: str) -> sympy.Expr:
    value = call.arguments[name]
    assert isinstance(value, Value)
    assert value.table is not None
    return value.table.rows
