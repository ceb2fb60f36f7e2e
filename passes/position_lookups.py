"""The positions region of a decoder: tables, looked up at the positions of a step.

    def positions(self, tokens, past, keys):
        n = tokens.shape[1];  L = keys.shape[2]
        at = unsqueeze(past, -1) + arange(n)        # i64 [B, n]
        i = arange(L)                               # i64 [L]
        seen = i <= unsqueeze(at, -1)               # bool [B, n, L]
        cos = self.cos_[at]                         # [B, n, 8]
        …

Masks are made of `seen` and as few numbers as say the same: none for a causal one, one a head and key for a bias
by key, one a distance for a window.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch import Tensor, fx

from moec.ir import Region
from moec.ir.graphs import graph_module, place, root_module

from .position_labels import Read
from .position_moves import HELD, NEW
from .position_tables import PositionTables

aten = torch.ops.aten


class Lookups:
    """Builds the region and its call in the root; each lookup is made once, whoever reads it."""

    def __init__(
        self,
        root: fx.GraphModule,
        tables: PositionTables,
        inputs: dict[str, fx.Node],
        held: tuple[str, int] | None,
    ) -> None:
        """`inputs`: of the root, by name. `held`: the cache that says how many positions are held, and at which
        dim; None when nothing is remembered."""
        self.root, self.tables = root, tables
        self.owner, self.graph = root_module(), fx.Graph()
        names = ["tokens", "past", *([held[0]] if held else [])]
        self.given = {
            name: self.graph.placeholder("cache" if held and name == held[0] else name) for name in names
        }
        last = list(inputs.values())[-1]
        with root.graph.inserting_after(last):
            self.call = root.graph.create_node(
                "call_module", "positions_", tuple(inputs[n] for n in names), {}
            )
        self.outputs: list[fx.Node] = []
        self.made: dict[Any, fx.Node] = {}
        self.named: set[str] = set()
        self.device = tables.device
        self.held = held
        self._at = self._positions()
        self.at = self._leaves(self._at, "at")

    def value(self, read: Read) -> fx.Node:
        """The value, in the root, that stands for what `read` read; broadcasts over the batch."""
        key = (read.index, read.rank, read.roles, read.scores)
        if key not in self.made:
            name = read.value.name if read.value is not None else "visible"
            self.made[key] = self._leaves(self._looked_up(read), name)
        return self.made[key]

    def finish(self) -> None:
        """Put the region in the place of the one that computed positions."""
        self.graph.output(tuple(self.outputs))
        module = graph_module(self.owner, self.graph)
        module.meta["region"] = Region(kind="positions", index=0)
        if hasattr(self.root, "positions"):
            for node in [
                n for n in self.root.graph.nodes if n.op == "call_module" and n.target == "positions"
            ]:
                for item in list(node.users):
                    self.root.graph.erase_node(item) if not item.users else None
                self.root.graph.erase_node(node) if not node.users else None
            self.root.delete_submodule("positions")
        self.root.add_submodule("positions", module)
        self.call.target = "positions"

    # building blocks

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def _leaves(self, node: fx.Node, name: str) -> fx.Node:
        """Return `node` from the region; its item in the root."""
        if node.op == "call_function" and node.name not in self.named:
            node.name = self._free(name)
            self.named.add(node.name)
        self.outputs.append(node)
        after = self.call if len(self.outputs) == 1 else self._last
        with self.root.graph.inserting_after(after):
            item = self.root.graph.create_node(
                "call_function", operator.getitem, (self.call, len(self.outputs) - 1), {}, name
            )
        self._last = item
        return item

    def _table(self, name: str, value: Tensor) -> fx.Node:
        while hasattr(self.owner, name):
            name += "_"
        place(self.owner, name, value, persistent=False)
        return self.graph.get_attr(name)

    def _free(self, name: str) -> str:
        """`name`, with a number behind it where it is taken."""
        taken = {node.name for node in self.graph.nodes}
        return name if name not in taken else next(n for i in count(1) if (n := f"{name}_{i}") not in taken)

    def _once(self, key: str, make: Callable[[], fx.Node]) -> fx.Node:
        if key not in self.made:
            self.made[key] = made = make()
            made.name = self._free(key)
            self.named.add(made.name)
        return self.made[key]

    def _positions(self) -> fx.Node:
        n = self._once("n", lambda: self._call(aten.sym_size.int, self.given["tokens"], 1))
        steps = self._once("steps", lambda: self._call(aten.arange.default, n, device=self.device))
        past = self._once("first", lambda: self._call(aten.unsqueeze.default, self.given["past"], -1))
        return self._once("at", lambda: self._call(aten.add.Tensor, past, steps))

    def _length(self) -> fx.Node:
        assert self.held is not None
        name, dim = self.held
        return self._once("L", lambda: self._call(aten.sym_size.int, self.given[name], dim))

    def _keys(self) -> fx.Node:
        return self._once("i", lambda: self._call(aten.arange.default, self._length(), device=self.device))

    def _seen(self) -> fx.Node:
        """bool [B, n, L]: the positions up to each new one."""
        rows = self._once("rows", lambda: self._call(aten.unsqueeze.default, self._at, -1))
        return self._once("seen", lambda: self._call(aten.le.Tensor, self._keys(), rows))

    def _distance(self) -> fx.Node:
        """i64 [B, n, L]: how far back each held position is, 0 for later ones."""

        def make() -> fx.Node:
            rows = self._once("rows", lambda: self._call(aten.unsqueeze.default, self._at, -1))
            return self._call(aten.clamp.default, self._call(aten.sub.Tensor, rows, self._keys()), 0)

        return self._once("distance", make)

    def _unsqueezed(self, node: fx.Node, rank: int) -> fx.Node:
        """[B, n, L] → [B, 1, …, n, L]."""
        for _ in range(rank - 3):
            node = self._call(aten.unsqueeze.default, node, 1)
        return node

    # lookups

    def _looked_up(self, read: Read) -> fx.Node:
        roles = dict(read.roles)
        name = f"{read.value.name}_table" if read.value is not None else ""
        if read.index == -1:
            return self._unsqueezed(self._seen(), read.rank)
        if not roles:
            return self._table(name, self.tables.columns(read.index, read.rank))
        if set(roles.values()) == {HELD}:
            (dim,) = roles
            table = self._table(name, self.tables.columns(read.index, read.rank))
            return self._call(aten.slice.Tensor, table, dim, 0, self._length())
        if set(roles.values()) == {NEW}:
            (dim,) = roles
            table = self._table(name, self.tables.rows(read.index, read.rank, dim))
            return self._moved(self._call(aten.index.Tensor, table, [self._at]), 1, dim, read.rank)
        return self._mask(read, name)

    def _moved(self, node: fx.Node, source: int, target: int, rank: int) -> fx.Node:
        """`node` with dim `source` at `target`, the others in order."""
        if source == target:
            return node
        order = [dim for dim in range(rank) if dim != source]
        order.insert(target, source)
        return self._call(aten.permute.default, node, order)

    def _mask(self, read: Read, name: str) -> fx.Node:
        shown, rank = self.tables.shown(read.index, read.rank), read.rank
        seen = self._unsqueezed(self._seen(), rank)
        if shown.kind == "plain":
            return seen if shown.hidden is False else self._chosen(seen, 0.0, shown.hidden, read)
        assert shown.numbers is not None
        table = self._table(name, shown.numbers)
        if shown.kind == "key":
            table = self._call(aten.slice.Tensor, table, rank - 2, 0, self._length())
            table = self._call(aten.unsqueeze.default, table, -2)
            return self._chosen(seen, table, shown.hidden, read)
        if shown.kind == "distance":
            found = self._call(aten.index.Tensor, table, [self._distance()])  # [B, n, L, …]
            for _ in range(rank - 3):
                found = self._moved(found, rank - 1, 1, rank)
            return self._chosen(seen, found, shown.hidden, read)
        found = self._call(aten.index.Tensor, table, [self._at])  # [B, n, …, L]
        found = self._moved(found, 1, rank - 2, rank)
        return self._call(aten.slice.Tensor, found, rank - 1, 0, self._length())

    def _chosen(self, seen: fx.Node, numbers: Any, hidden: float | bool, read: Read) -> fx.Node:
        if isinstance(hidden, bool):
            joined = aten.logical_or.default if hidden else aten.logical_and.default
            side = self._call(aten.logical_not.default, seen) if hidden else seen
            return side if isinstance(numbers, float) else self._call(joined, side, numbers)
        value = self.tables.values[read.index]
        assert value is not None
        made = aten.where.ScalarOther if isinstance(numbers, fx.Node) else aten.where.Scalar
        chosen = self._call(made, seen, numbers, hidden)
        wrong = not isinstance(numbers, fx.Node) and value.dtype != torch.get_default_dtype()
        return self._call(aten.to.dtype, chosen, value.dtype) if wrong else chosen
