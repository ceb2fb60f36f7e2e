"""What becomes of tables of counts, and of the number of rows, as a graph passes them on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from moec.cost.reading.call import GraphCall
from moec.cost.reading.routing import Counted, Expected, Routing
from moec.cost.reading.rows import CountedTable, Rows, Table
from moec.cost.reading.value import Value
from moec.cost.symbols import symbol
from moec.errors import CostError
from moec.ir.mesh import Mesh

# Which result of an operator that chooses are the rows kept for each expert.
_COUNTS = {"moec::assign": 1, "moec::admit": 1, "moec::gate": 4}
_GATHER, _EXCHANGE = "_c10d_functional::all_gather_into_tensor", "_c10d_functional::all_to_all_single"
_REDUCE = "_c10d_functional::all_reduce"


class Tables:
    """The tables of one walk over a graph of `mesh`, read for the rank `rank`.

    Of a routing that is known in the mean, a table is followed by what it counts; of one that was counted,
    the arithmetic that stands in the graph is done, for all ranks together, as they tell each other theirs.
    """

    def __init__(self, routing: Routing, mesh: Mesh, rank: int) -> None:
        self.routing, self.mesh, self.rank = routing, mesh, rank
        self.places = mesh.coordinates(rank)
        self._given: list[Iterator[Tensor]] = []
        if isinstance(routing, Counted):
            if len(routing.tables) != mesh.world:
                raise CostError("routing", f"tables of {len(routing.tables)} ranks", f"of {mesh.world}")
            self._given = [iter(tables) for tables in routing.tables]

    def of(self, name: str, call: GraphCall, known: dict[fx.Node, Any]) -> dict[int, Rows]:
        """The tables among the results of a call of operator `name`, by the number of the result."""
        if name in _COUNTS:
            return {_COUNTS[name]: self._drawn(name, call)}
        if isinstance(self.routing, Counted):
            numbers = self._numbers(name, call, known)
            return {} if numbers is None else {0: CountedTable(numbers, self.rank)}
        table = self._followed(name, call)
        return {} if table is None else {0: table}

    def require_all_read(self) -> None:
        """Raise `CostError` where a run had more expert layers than the graph."""
        if any(next(tables, None) is not None for tables in self._given):
            raise CostError("routing", "tables of more expert layers than there are", "one of each")

    # what a router makes

    def _drawn(self, name: str, call: GraphCall) -> Rows:
        if isinstance(self.routing, Counted):
            experts = _experts(name, call)
            return CountedTable(tuple(self._next(tables, experts) for tables in self._given), self.rank)
        assert isinstance(self.routing, Expected)
        tokens, top_k, experts = _choosing(name, call), _top_k(name, call), _experts(name, call)
        rows, capacity = tokens * top_k, _factor(call) / experts
        if not capacity:
            return Table(rows, tokens, top_k, experts, self.routing)
        shares = self.routing.shares(experts, top_k)
        if shares is None:
            kept = _kept(call, rows, _others(name, call), experts)
        else:
            kept = rows * sum(min(share, capacity) for share in shares)
        return Table(kept, tokens, top_k, experts, self.routing, capacity)

    def _next(self, tables: Iterator[Tensor], experts: int) -> Tensor:
        found = next(tables, None)
        if found is None or found.shape != (experts,):
            told = "no table" if found is None else f"a table {list(found.shape)}"
            raise CostError("routing", f"{told} for a layer of {experts} experts", "i64 [E], layer by layer")
        return found

    # what becomes of it

    def _followed(self, name: str, call: GraphCall) -> Rows | None:
        found = [value.table for value in call.arguments.values() if isinstance(value, Value) and value.table]
        if not found or any(value.dtype.is_floating_point for value in call.results):
            return None
        table, axis = found[0], symbol(str(call.arguments.get("group_name")))
        assert isinstance(table, Table)
        if name == _EXCHANGE:
            return table.arrived(axis)
        return table.of_ranks(axis) if name in (_GATHER, _REDUCE) else table

    def _numbers(self, name: str, call: GraphCall, known: dict[fx.Node, Any]) -> tuple[Tensor, ...] | None:
        """The numbers of every rank, where those of all operands are known."""
        node, given = call.node, [known[other] for other in call.node.all_input_nodes]
        if not given or not all(isinstance(v, Value) and isinstance(v.table, CountedTable) for v in given):
            return None
        if name in (_EXCHANGE, _GATHER):
            return self._told(name, given[0].table.numbers, call)
        if name == _REDUCE:
            return None
        assert callable(node.target)
        at = [lambda other, rank=rank: known[other].table.numbers[rank] for rank in range(self.mesh.world)]
        return tuple(node.target(*fx.map_arg(node.args, get), **fx.map_arg(node.kwargs, get)) for get in at)

    def _told(self, name: str, numbers: tuple[Tensor, ...], call: GraphCall) -> tuple[Tensor, ...]:
        """What ranks have once they told each other their numbers."""
        axis, made = str(call.arguments["group_name"]), []
        for rank in range(self.mesh.world):
            group = self.mesh.group(axis, rank)
            parts = [numbers[other] for other in group]
            if name == _EXCHANGE:
                place = group.index(rank)
                parts = [part.split(list(call.arguments["input_split_sizes"]))[place] for part in parts]
            made.append(torch.cat(parts))
        return tuple(made)

    def rows_of(self, name: str, call: GraphCall) -> sympy.Expr | None:
        """The number of rows of a result whose size is data."""
        if name == "moec::share":
            return self._stretch(call.shape("x")[0], str(call.arguments["axis"]))
        if name in ("moec::exchange", "moec::gather_rows"):
            return table_in(call, "receive" if name == "moec::exchange" else "sizes").rows
        if name == "moec::scatter_rows":
            table, axis = table_in(call, "sizes"), str(call.arguments["axis"])
            if isinstance(table, Table):
                return table.rows / symbol(axis)
            return sympy.Integer(table.here[self.mesh.coordinate(axis, self.rank)])
        return None

    def _stretch(self, rows: sympy.Expr, axis: str) -> sympy.Expr:
        """This rank's of `rows` rows that are dealt out; in the mean, where routing is known in the mean."""
        ranks = symbol(axis)
        if not isinstance(self.routing, Counted):
            return rows / ranks
        return sympy.floor((rows + ranks - 1 - self.mesh.coordinate(axis, self.rank)) / ranks)


def table_in(call: GraphCall, name: str) -> Rows:
    """The table in the argument `name`; raises `CostError` where there is none."""
    value = call.arguments[name]
    if not isinstance(value, Value) or value.table is None:
        raise CostError(str(call.node), f"'{name}' is not known", "numbers that follow from the routing")
    return value.table


def _choosing(name: str, call: GraphCall) -> sympy.Expr:
    return call.shape("x" if name == "moec::gate" else "experts")[0]


def _top_k(name: str, call: GraphCall) -> int:
    return int(call.value("top_k") if name == "moec::gate" else call.shape("experts")[1])


def _experts(name: str, call: GraphCall) -> int:
    if name == "moec::assign":
        return int(call.value("num_experts"))
    return int(call.shape("router")[0] if name == "moec::gate" else call.shape("choices")[1])


def _others(name: str, call: GraphCall) -> sympy.Expr:
    """How many ranks' tokens the capacity counts."""
    return symbol(str(call.arguments["axis"])) if name == "moec::admit" else sympy.Integer(1)


def _factor(call: GraphCall) -> float:
    """The capacity factor of this phase, 0 for none."""
    factor, in_eval = float(call.value("capacity_factor")), float(call.value("eval_capacity_factor"))
    return factor if call.training else in_eval


def _kept(call: GraphCall, rows: sympy.Expr, others: sympy.Expr, experts: int) -> sympy.Expr:
    """Of `rows` here, which are dealt out evenly, those that find a place beside those of `others` ranks."""
    factor = sympy.nsimplify(_factor(call), rational=True)
    if factor >= 1:
        return rows
    # Without fractions of letters: sympy takes 16/B to be at least 16 (as of 1.14).
    least = int(call.value("min_capacity")) * experts
    return sympy.Min(rows * others, sympy.Max(factor * rows * others, least)) / others
