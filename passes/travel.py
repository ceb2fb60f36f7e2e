"""Writes the way of the rows into one expert layer: choose, send, compute, send back.

Legend: T tokens here, N rows here = T·K, M rows that arrive, E experts of the layer, e experts of a rank,
R ranks of the expert axis.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import fx

import moec.runtime.ops  # noqa: F401 - registers torch.ops.moec
from moec.ir import region_of
from moec.ir.graphs import output, placeholder
from moec.ir.mesh import DATA, TENSOR, WORLD, ExpertAxes, Mesh
from moec.ir.patterns import is_call

from .expert_slices import GROUPED, between, shorten

aten = torch.ops.aten
ops = torch.ops.moec
c10d = torch.ops._c10d_functional


def lower_expert_layer(module: fx.GraphModule, mesh: Mesh, axes: ExpertAxes) -> None:
    """Rewrite the graph of the region `moe_*` for one rank of `mesh`, in place; weights are left as they
    are."""
    _Lowering(module, mesh, axes).apply()


class _Lowering:
    def __init__(self, module: fx.GraphModule, mesh: Mesh, axes: ExpertAxes) -> None:
        region = region_of(module)
        assert region is not None
        self.module, self.graph, self.mesh, self.axes = module, module.graph, mesh, axes
        self.settings = region.settings
        self.meta = {"path": region.path, "source": region.source}
        self.shared = bool(self.settings["shared"])
        self.tokens_axis = WORLD if self.shared else DATA
        self.num_seeing = mesh.world if self.shared else mesh.data

    def apply(self) -> None:
        if self.shared:
            self._share()
        chosen = self._count()
        self._losses(chosen)
        if self.axes.expert > 1 or self.axes.slice > 1:
            self._travel()
        self.graph.eliminate_dead_code()
        self.module.recompile()

    def _find(self, target: Any) -> fx.Node:
        return next(node for node in self.graph.nodes if is_call(node, target))

    def _call(self, name: str, target: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        self._name(node, name)
        return node

    def _name(self, node: fx.Node, name: str) -> None:
        node.name, node.meta = self.graph._graph_namespace.create_name(name, None), dict(self.meta)

    def _await(self, name: str, target: Any, *args: Any) -> fx.Node:
        return self._call(name, c10d.wait_tensor.default, self._call(f"{name}_started", target, *args))

    # each tensor rank its share of the tokens

    def _share(self) -> None:
        x = placeholder(self.graph)
        flat = next((n for n in self.graph.nodes if is_call(n, aten.flatten.using_ints)), x)
        with self.graph.inserting_before(next(iter(flat.users))):
            mine = self._call("mine", ops.share.default, flat, TENSOR)
        flat.replace_all_uses_with(
            mine, delete_user_cb=lambda u: u is not mine and not _shapes_only(u), propagate_meta=False
        )
        sums = self._find(ops.combine.default)
        with self.graph.inserting_after(sums):
            whole = self.graph.call_function(ops.unshare.default)
        sums.replace_all_uses_with(whole, propagate_meta=False)
        with self.graph.inserting_before(whole):
            count = self._call("num_tokens", aten.sym_size.int, flat, 0)
        whole.args = (sums, count, TENSOR)
        self._name(whole, "answers")

    # what all ranks have to know of each other's choices

    def _count(self) -> fx.Node:
        """The choices of all ranks' tokens, i64 [E]; capacity and the counts given back are made global."""
        table = self._find(ops.assign.default)
        counts = next(user for user in table.users if user.args[1] == 1)
        if self.num_seeing == 1:
            return counts
        with self.graph.inserting_before(counts.next):
            if table.args[2] or table.args[3]:
                return self._admit(table, counts)
            args = (counts, "sum", self.tokens_axis)
            started = self._call("total_started", c10d.all_reduce.default, *args)
        with self.graph.inserting_before(self._find(ops.balance_loss.default)):  # nobody needs it before
            total = self._call("total", c10d.wait_tensor.default, started)
        self._give_back(total)
        return total

    def _admit(self, table: fx.Node, counts: fx.Node) -> fx.Node:
        experts, num_experts, *limits = table.args
        with self.graph.inserting_before(table):
            picked = self._call("picked", ops.choices.default, experts, num_experts)
            gather = c10d.all_gather_into_tensor.default
            choices = self._await("choices", gather, picked, self.num_seeing, self.tokens_axis)
            chosen = self._call("chosen", aten.sum.dim_IntList, choices, [0])
        table.target, table.args = ops.admit.default, (experts, choices, self.tokens_axis, *limits)
        kept = self._call("kept", operator.getitem, table, 2)
        self._give_back(kept)
        return chosen

    def _give_back(self, counts: fx.Node) -> None:
        end = output(self.graph)
        y, balance, z = cast(tuple[fx.Node, ...], end.args[0])[:3]
        end.args = ((y, balance, z, counts),)

    def _losses(self, chosen: fx.Node) -> None:
        """Terms of which the sum over all ranks is the program's."""
        copies = 1 if self.shared else self.mesh.tensor
        for target, share in (
            (ops.balance_loss.default, ops.balance_share.default),
            (ops.z_loss.default, ops.z_share.default),
        ):
            loss = self._find(target)
            if self.num_seeing > 1:
                loss.target, loss.args = share, (loss.args[0], chosen, self.settings["top_k"])
            if copies > 1:  # every tensor rank computes the same
                with self.graph.inserting_after(loss):
                    part = self.graph.call_function(aten.div.Tensor)
                loss.replace_all_uses_with(part, propagate_meta=False)
                part.args = (loss, copies)
                self._name(part, f"{loss.name}_share")

    # the way of the rows

    def _travel(self) -> None:
        rows, sums = self._find(ops.dispatch.default), self._find(ops.combine.default)
        out, _, order, counts = cast(tuple[fx.Node, ...], sums.args)
        products = [node for node in self.graph.nodes if is_call(node, GROUPED)]
        readers = list(rows.users)
        with self.graph.inserting_before(rows.next):
            way = _Way(self, counts, order)
            here, arrived = way.there(rows)
        for reader in readers:
            reader.replace_input_with(rows, arrived)
        for product in products:
            product.args = (*product.args[:3], here)
        if self.axes.slice > 1:
            self._slice(products[-1])
        with self.graph.inserting_before(sums):
            sums.args = (way.back(out), *sums.args[1:])

    def _slice(self, down: fx.Node) -> None:
        """Each slice adds its part of the down product's bias; sizes in between are those of a slice."""
        for node in between(self.module, down):
            shorten(node, self.axes.slice)
        if down.args[2] is not None:
            with self.graph.inserting_before(down):
                part = self._call("bias_part", aten.div.Tensor, down.args[2], self.axes.slice)
            down.args = (*down.args[:2], part, down.args[3])


class _Way:
    """The collectives of one layer, written there and back."""

    def __init__(self, lowering: _Lowering, counts: fx.Node, order: fx.Node) -> None:
        self.call, self.wait, self.axes = lowering._call, lowering._await, lowering.axes
        self.counts, self.order = counts, order
        self.each = lowering.settings["experts"] // self.axes.expert
        inside = lowering.mesh.inside(self.axes)
        two_steps = lowering.settings["exchange"] == "hierarchical"
        self.hops = _Hierarchical(self, inside) if two_steps else _Flat(self)
        self.num_blocks = self.axes.expert * self.axes.slice

    def there(self, rows: fx.Node) -> tuple[fx.Node, fx.Node]:
        """(rows of each expert here i64 [e], the rows by expert [M, D])."""
        self.sent_from = rows
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


class _Flat:
    """One exchange over the whole expert axis; none where one rank holds all experts."""

    def __init__(self, way: _Way) -> None:
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


class _Hierarchical:
    """Inside the node first, each rank to the one that stands as its destination does; then between nodes.

    Legend: L ranks inside a node, C nodes; a destination is (c, l), and R = C·L.
    Source: DeepSpeed-MoE, section 5.3: O(L + R/L) messages, twice the volume.
    """

    def __init__(self, way: _Way, inside: int) -> None:
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


def _shapes_only(node: fx.Node) -> bool:
    return is_call(node, aten.sym_size.int)
