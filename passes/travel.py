"""Writes the way of the rows into one expert layer: choose, send, compute, send back.

Legend: T tokens here, N rows here = T·K, E experts of the layer.
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
from .ways import Way, Writer

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
        writer = self.writer = Writer(self.graph, self.meta)
        self._call, self._await, self._name = writer.call, writer.wait, writer.name
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
        self._name(whole, "answers", sums)

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
                self._name(part, f"{loss.name}_share", loss)

    # the way of the rows

    def _travel(self) -> None:
        rows, sums = self._find(ops.dispatch.default), self._find(ops.combine.default)
        out, _, order, counts = cast(tuple[fx.Node, ...], sums.args)
        products = [node for node in self.graph.nodes if is_call(node, GROUPED)]
        readers = list(rows.users)
        with self.graph.inserting_before(rows.next):
            inside = self.mesh.inside(self.axes) if self.settings["exchange"] == "hierarchical" else 0
            way = Way(self.writer, self.axes, self.settings["experts"], inside, counts, order)
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


def _shapes_only(node: fx.Node) -> bool:
    return is_call(node, aten.sym_size.int)
