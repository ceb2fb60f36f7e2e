"""The positions region of a decoder: tables, looked up at the positions of a step.

    def positions(self, tokens, past, cache):
        n = tokens.shape[1];  L = cache.shape[2]
        at = unsqueeze(past, -1) + arange(n)        # i64 [B, n]
        i = arange(L)                               # i64 [L]
        seen = i <= unsqueeze(at, -1)               # bool [B, n, L]
        cos = self.cos_table[at]                    # [B, n, 8]
        …

Masks are made of `seen` and as few numbers as say the same: none for a causal one, one a head and key for a
bias by key, one a distance for a window.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch import Tensor, fx

from moec.ir import Region, regions
from moec.ir.graphs import graph_module, place, root_module
from moec.ir.identity import made_from

from .position_axes import HELD, NEW, Read, refusal
from .position_shapes import Shown
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
        """`inputs`: of the root, by name. `held`: the cache that says how many positions are held, and at
        which dim; None when nothing is remembered."""
        self.root, self.tables, self.held, self.device = root, tables, held, tables.device
        self.replaced = next(iter(regions(root, "positions")), None)
        self.owner, self.graph = root_module(), fx.Graph()
        self.names: set[str] = set()
        given = {"tokens": "tokens", "past": "past"} | ({held[0]: "cache"} if held else {})
        self.given = {name: self.graph.placeholder(inside) for name, inside in given.items()}
        self.names |= set(given.values())
        with root.graph.inserting_after(list(inputs.values())[-1]):
            self.call = root.graph.create_node("call_module", "lookups", tuple(inputs[n] for n in given), {})
        self.computed = {} if self.replaced is None else self._computed(self.replaced)
        self.items: list[tuple[fx.Node, str]] = []
        self.outputs: list[fx.Node] = []
        self.made: dict[Any, fx.Node] = {}
        self.at = self._leaves(self._at(), "at")

    def value(self, read: Read) -> fx.Node:
        """The value, in the root, that stands for what `read` read; broadcasts over the batch."""
        key = (read.index, read.rank, read.roles, read.times)
        if key not in self.made:
            name = "visible" if read.table is None else read.table.name
            self.made[key] = leaf = self._leaves(self._looked_up(read, name), name)
            if read.index in self.computed:
                made_from(leaf, self.computed[read.index], taking=())
        return self.made[key]

    def finish(self) -> None:
        """Put the region in the place of the one that computed positions."""
        self.graph.output(tuple(self.outputs))
        module = graph_module(self.owner, self.graph)
        module.meta["region"] = Region(kind="positions", index=0)
        if self.replaced is not None:
            self._forget(self.replaced)
        name = self.replaced or _unused("positions", {name for name, _ in self.root.named_children()})
        self.root.add_submodule(name, module)
        self.call.target = self.call.name = name
        taken = {node.name for node in self.root.graph.nodes} - {item.name for item, _ in self.items}
        for item, wanted in self.items:
            item.name = _unused(wanted, taken)
            taken.add(item.name)

    def _computed(self, name: str) -> dict[int, fx.Node]:
        """The results of the region `name` in the root, by number; the new call is made from its call."""
        call = next(n for n in self.root.graph.nodes if n.op == "call_module" and n.target == name)
        made_from(self.call, call, taking=())
        items = {user.args[1]: user for user in call.users if user.target is operator.getitem}
        return items or {0: call}

    def _forget(self, name: str) -> None:
        """Erase the region `name` and its call, of which nothing is read any more."""
        for node in [n for n in self.root.graph.nodes if n.op == "call_module" and n.target == name]:
            for user in [user for user in node.users if user.target is operator.getitem]:
                if user.users:
                    raise refusal(
                        f"positions: {user.name}", "positions that are read outside of tokens' values"
                    )
                self.root.graph.erase_node(user)
            if node.users:
                raise refusal(f"positions: {node.name}", "positions that are read outside of tokens' values")
            self.root.graph.erase_node(node)
        self.root.delete_submodule(name)

    # building blocks

    def _call(self, name: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        made = self.graph.call_function(target, args, kwargs)
        made.name = _unused(name, self.names)
        self.names.add(made.name)
        return made

    def _leaves(self, node: fx.Node, name: str) -> fx.Node:
        """Return `node` from the region; its item in the root."""
        self.outputs.append(node)
        last = self.items[-1][0] if self.items else self.call
        place_of = (self.call, len(self.outputs) - 1)
        with self.root.graph.inserting_after(last):
            item = self.root.graph.create_node("call_function", operator.getitem, place_of, {}, name)
        self.items.append((item, name))
        return item

    def _table(self, name: str, value: Tensor) -> fx.Node:
        name = _unused(f"{name}_table", {known for known, _ in self.owner.named_buffers()})
        place(self.owner, name, value, persistent=False)
        return self.graph.get_attr(name)

    def _once(self, key: Any, make: Callable[[], fx.Node]) -> fx.Node:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    # positions

    def _at(self) -> fx.Node:
        n = self._call("n", aten.sym_size.int, self.given["tokens"], 1)
        steps = self._call("steps", aten.arange.default, n, device=self.device)
        first = self._call("first", aten.unsqueeze.default, self.given["past"], -1)
        self.made["at"] = self._call("at", aten.add.Tensor, first, steps)
        return self.made["at"]

    def _length(self) -> fx.Node:
        assert self.held is not None
        name, dim = self.held
        return self._once("L", lambda: self._call("L", aten.sym_size.int, self.given[name], dim))

    def _keys(self) -> fx.Node:
        return self._once(
            "i", lambda: self._call("i", aten.arange.default, self._length(), device=self.device)
        )

    def _rows(self) -> fx.Node:
        return self._once("rows", lambda: self._call("rows", aten.unsqueeze.default, self.made["at"], -1))

    def _seen(self, read: Read) -> fx.Node:
        """bool [B, 1, …, n, L]: the positions up to each new one."""
        seen = self._once("seen", lambda: self._call("seen", aten.le.Tensor, self._keys(), self._rows()))
        return self._shaped("visible", seen, read)

    def _distance(self) -> fx.Node:
        """i64 [B, n, L]: how far back each held position is, 0 for later ones."""

        def make() -> fx.Node:
            back = self._call("back", aten.sub.Tensor, self._rows(), self._keys())
            return self._call("distance", aten.clamp.default, back, 0)

        return self._once("distance", make)

    def _shaped(self, name: str, node: fx.Node, read: Read) -> fx.Node:
        """[B, n, L] → [times·B, 1, …, n, L], made once."""

        def make() -> fx.Node:
            made = self._repeated(name, node, read)
            for _ in range(read.rank - 3):
                made = self._call(name, aten.unsqueeze.default, made, 1)
            return made

        return self._once((node, read.rank, read.times), make)

    def _repeated(self, name: str, node: fx.Node, read: Read) -> fx.Node:
        if read.times == 1:
            return node
        return self._call(f"{name}_rows", aten.repeat_interleave.self_int, node, read.times, 0)

    # lookups

    def _looked_up(self, read: Read, name: str) -> fx.Node:
        roles = dict(read.roles)
        if read.index == -1:
            return self._seen(read)
        if not roles:
            return self._table(name, self.tables.columns(read.index, read.rank))
        if set(roles.values()) == {NEW, HELD}:
            return self._mask(read, name)
        (dim,) = roles
        if HELD in roles.values():
            table = self._table(name, self.tables.columns(read.index, read.rank))
            return self._call(name, aten.slice.Tensor, table, dim, 0, self._length())
        found = self._indexed(name, self.tables.rows(read.index, read.rank, dim), self.made["at"])
        return self._repeated(name, self._moved(name, found, 1, dim, read.rank), read)

    def _indexed(self, name: str, table: Tensor, index: fx.Node) -> fx.Node:
        return self._call(name, aten.index.Tensor, self._table(name, table), [index])

    def _moved(self, name: str, node: fx.Node, source: int, target: int, rank: int) -> fx.Node:
        """`node` with dim `source` at `target`, the others in order."""
        if source == target:
            return node
        order = [dim for dim in range(rank) if dim != source]
        order.insert(target, source)
        return self._call(name, aten.permute.default, node, order)

    def _mask(self, read: Read, name: str) -> fx.Node:
        shown, rank = self.tables.shown(read.index, read.rank), read.rank
        if shown.kind == "full":
            assert shown.numbers is not None
            found = self._indexed(name, shown.numbers, self.made["at"])  # [B, n, …, L]
            found = self._moved(name, found, 1, rank - 2, rank)
            held = self._call(name, aten.slice.Tensor, found, rank - 1, 0, self._length())
            return self._repeated(name, held, read)
        return self._chosen(read, name, shown, self._numbers(read, name, shown))

    def _numbers(self, read: Read, name: str, shown: Shown) -> fx.Node | None:
        """What a mask says of the positions that are seen; None where that is one number."""
        if shown.numbers is None:
            return None
        rank = read.rank
        if shown.kind == "key":
            table = self._table(name, shown.numbers)
            held = self._call(f"{name}_keys", aten.slice.Tensor, table, rank - 2, 0, self._length())
            return self._call(f"{name}_keys", aten.unsqueeze.default, held, -2)
        found = self._indexed(f"{name}_back", shown.numbers, self._distance())  # [B, n, L, …]
        for _ in range(rank - 3):
            found = self._moved(f"{name}_back", found, rank - 1, 1, rank)
        return self._repeated(f"{name}_back", found, read)

    def _chosen(self, read: Read, name: str, shown: Shown, numbers: fx.Node | None) -> fx.Node:
        seen, hidden = self._seen(read), shown.hidden
        if isinstance(hidden, bool):
            side = self._call(f"{name}_later", aten.logical_not.default, seen) if hidden else seen
            joined = aten.logical_or.default if hidden else aten.logical_and.default
            return side if numbers is None else self._call(name, joined, side, numbers)
        if numbers is not None:
            return self._call(name, aten.where.ScalarOther, seen, numbers, hidden)
        chosen = self._call(name, aten.where.Scalar, seen, shown.fill, hidden)
        dtype = self.tables.dtype(read.index)
        same = dtype == (torch.get_default_dtype() if dtype.is_floating_point else torch.int64)
        return chosen if same else self._call(name, aten.to.dtype, chosen, dtype)


def _unused(name: str, taken: set[str]) -> str:
    """`name`, with a number behind it where it is taken."""
    return name if name not in taken else next(n for i in count(1) if (n := f"{name}_{i}") not in taken)
