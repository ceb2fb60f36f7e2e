"""The ways that rows take to their experts and back, written into a graph collective by collective.

Legend: N rows here, M rows that arrive, E experts of the layer, e of a rank, R ranks of the expert axis.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

import moec.runtime.ops  # noqa: F401 - registers torch.ops.moec
from moec.ir.identity import made_from
from moec.ir.mesh import ExpertAxes

aten = torch.ops.aten
ops = torch.ops.moec
c10d = torch.ops._c10d_functional


class Writer:
    """Writes calls into `graph` at its insert point, with the place in the user's model that `meta` names."""

    def __init__(self, graph: fx.Graph, meta: dict[str, Any]) -> None:
        self.graph, self.meta = graph, meta

    def call(self, name: str, target: Any, *args: Any) -> fx.Node:
        """`name = target(*args)`."""
        node = self.graph.call_function(target, args)
        self.name(node, name)
        return node

    def name(self, node: fx.Node, name: str, *sources: fx.Node) -> None:
        """Give `node` this name, or the nearest free one; it was made from `sources`, if any."""
        node.name = self.graph._graph_namespace.create_name(name, None)
        if sources:
            made_from(node, *sources)
        node.meta |= self.meta

    def wait(self, name: str, target: Any, *args: Any) -> fx.Node:
        """`name_started = target(*args)`, a collective, and `name = wait_tensor(name_started)`."""
        return self.call(name, c10d.wait_tensor.default, self.call(f"{name}_started", target, *args))


class Way:
    """The way of the rows of one layer, written there and back.

    `experts`: of the layer; `inside`: ranks of the expert axis inside a node for an exchange in two steps, 0
    for a single one; `counts` i64 [E]: rows kept for each expert; `order` i64 [N].
    """

    def __init__(
        self, writer: Writer, axes: ExpertAxes, experts: int, inside: int, counts: fx.Node, order: fx.Node
    ) -> None:
        self.call, self.wait, self.axes = writer.call, writer.wait, axes
        self.counts, self.order = counts, order
        self.each, self.num_blocks = experts // axes.expert, axes.expert * axes.slice
        self.hops = Hierarchical(self, inside) if inside else Flat(self)

    def there(self, rows: fx.Node) -> tuple[fx.Node, fx.Node]:
        """(rows of each expert here i64 [e], the rows by expert [M, D])."""
        received, self.table = self.hops.there(rows)
        if self.axes.slice > 1:
            received = self._gather(received)
        if self.each > 1 and self.num_blocks > 1:
            received = self.call("by_expert", ops.regroup.default, received, self.table)
        return self.call("here", aten.sum.dim_IntList, self.table, [0]), received

    def back(self, out: Any) -> fx.Node:
        """The answers, where and in the order in which their rows were [N, D]."""
        if self.each > 1 and self.num_blocks > 1:
            turned = self.call("table_t", aten.t.default, self.table)
            out = self.call("by_sender", ops.regroup.default, out, turned)
        if self.axes.slice > 1:
            out = self._scatter(out)
        made: fx.Node = self.hops.back(out)
        return made

    def num_rows(self) -> fx.Node:
        """How many rows there are here, N."""
        return self.call("num_rows", aten.sym_size.int, self.order, 0)

    def _gather(self, received: fx.Node) -> fx.Node:
        """The rows of all ranks that share the experts; their blocks come one rank after the other."""
        gather, axis = c10d.all_gather_into_tensor.default, self.axes.slice_axis
        self.table = self.wait("tables", gather, self.table, self.axes.slice, axis)
        by_rank = self.call("by_rank", aten.unflatten.int, self.table, 0, [self.axes.slice, self.axes.expert])
        self.sizes = self.call("sizes", aten.sum.dim_IntList, by_rank, [1, 2])
        return self.call("gathered", ops.gather_rows.default, received, self.sizes, axis)

    def _scatter(self, out: fx.Node) -> fx.Node:
        axis = self.axes.slice_axis
        if self.axes.expert > 1:
            return self.call("added", ops.scatter_rows.default, out, self.sizes, axis)
        return self.call("added", ops.scatter_rows.default, out, self.sizes, axis, self.num_rows())


class Flat:
    """One exchange over the whole expert axis; none where one rank holds all experts."""

    def __init__(self, way: Way) -> None:
        self.way, self.ranks, self.axis = way, way.axes.expert, way.axes.expert_axis

    def there(self, rows: fx.Node) -> tuple[fx.Node, fx.Node]:
        call, each = self.way.call, self.way.each
        if self.ranks == 1:
            return rows, call("table", aten.unflatten.int, self.way.counts, 0, [1, each])
        leaving = call("leaving", aten.unflatten.int, self.way.counts, 0, [self.ranks, each])
        splits = [each] * self.ranks
        arriving = self.way.wait(
            "counts_here", c10d.all_to_all_single.default, self.way.counts, splits, splits, self.axis
        )
        table = call("arriving", aten.unflatten.int, arriving, 0, [self.ranks, each])
        self.sent = call("sent", aten.sum.dim_IntList, leaving, [1])
        self.got = call("got", aten.sum.dim_IntList, table, [1])
        received = self.way.wait("received", ops.exchange.default, rows, self.sent, self.got, self.axis)
        return received, table

    def back(self, out: fx.Node) -> fx.Node:
        if self.ranks == 1:
            return out
        args = (out, self.got, self.sent, self.axis, self.way.num_rows())
        return self.way.wait("returned", ops.exchange.default, *args)


class Hierarchical:
    """Inside the node first, each rank to the one that stands as its destination does; then between nodes.

    Legend: L ranks inside a node, C nodes; a destination is (c, l), and R = C·L.
    Source: DeepSpeed-MoE, section 5.3: O(L + R/L) messages, twice the volume.
    """

    def __init__(self, way: Way, inside: int) -> None:
        self.way, self.axes = way, way.axes
        self.inside, self.nodes = inside, way.axes.expert // inside

    def there(self, rows: fx.Node) -> tuple[fx.Node, fx.Node]:
        call, each = self.way.call, self.way.each
        leaving = call("leaving", aten.unflatten.int, self.way.counts, 0, [self.nodes, self.inside, each])
        by_place = call("by_place", aten.transpose.int, leaving, 0, 1)
        self.first = self._counts("inside", by_place, self.axes.inside_axis, self.inside, self.nodes)
        rows = self._turn("turned", rows, leaving)
        rows = self._hop("inside_rows", rows, self.first, self.axes.inside_axis)
        by_node = call("by_node", aten.transpose.int, self.first[1], 0, 1)
        self.second = self._counts("between", by_node, self.axes.between_axis, self.nodes, self.inside)
        rows = self._turn("turned_again", rows, self.first[1])
        rows = self._hop("received", rows, self.second, self.axes.between_axis)
        return rows, call("arriving", aten.flatten.using_ints, self.second[1], 0, 1)

    def back(self, out: fx.Node) -> fx.Node:
        leaving, between = self.first[0], self.second[0]
        out = self._return("home_node", out, self.second, self.axes.between_axis)
        out = self._turn("back_in_order", out, between)
        out = self._return("home", out, self.first, self.axes.inside_axis, self.way.num_rows())
        return self._turn("returned", out, leaving)

    def _counts(
        self, name: str, leaving: fx.Node, axis: str, ranks: int, others: int
    ) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node]:
        """(counts leaving, arriving [ranks, others, e]; rows sent to, got from each rank) of one hop."""
        call, size = self.way.call, others * self.way.each
        flat = call(f"{name}_leaving", aten.flatten.using_ints, leaving)
        splits = [size] * ranks
        counts = self.way.wait(f"{name}_counts", c10d.all_to_all_single.default, flat, splits, splits, axis)
        arriving = call(f"{name}_arriving", aten.unflatten.int, counts, 0, [ranks, others, self.way.each])
        sent = call(f"{name}_sent_rows", aten.sum.dim_IntList, leaving, [1, 2])
        got = call(f"{name}_got", aten.sum.dim_IntList, arriving, [1, 2])
        return leaving, arriving, sent, got

    def _turn(self, name: str, rows: fx.Node, counts: fx.Node) -> fx.Node:
        """Rows in blocks (a, b, expert) → (b, a, expert)."""
        blocks = self.way.call(f"{name}_blocks", aten.sum.dim_IntList, counts, [2])
        return self.way.call(name, ops.regroup.default, rows, blocks)

    def _hop(self, name: str, rows: fx.Node, hop: tuple[fx.Node, ...], axis: str) -> fx.Node:
        return self.way.wait(name, ops.exchange.default, rows, hop[2], hop[3], axis)

    def _return(
        self, name: str, rows: fx.Node, hop: tuple[fx.Node, ...], axis: str, *num_rows: fx.Node
    ) -> fx.Node:
        return self.way.wait(name, ops.exchange.default, rows, hop[3], hop[2], axis, *num_rows)
