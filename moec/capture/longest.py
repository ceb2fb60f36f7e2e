"""The longest sequence that a captured graph has positions for.

Known from the range that torch found for S, and from tables that are looked up by position: the positions are
computed for longer and longer sequences, until one lies outside of its table. So it does not matter how they
are spelled, or whether they begin at 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from moec.ir.dependence import token_dependent
from moec.ir.graphs import graph_module, placeholder
from moec.ir.retarget import on_device

aten = torch.ops.aten


@dataclass(frozen=True)
class Lookup:
    """`rows` rows of a table, read at the integers `index`; `wraps`: -1 is the last row."""

    rows: int
    index: fx.Node
    wraps: bool

    def holds(self, index: Tensor) -> bool:
        """Whether there is a row for every number."""
        least = -self.rows if self.wraps else 0
        return least <= int(index.min()) and int(index.max()) < self.rows


def longest_sequence(root: fx.GraphModule, exported: ExportedProgram) -> int | None:
    """The most positions that `root` (tokens [B, S] → logits) computes; None when it has no limit.

    Where positions cannot be computed (weights on `meta`, or memory of S × S), a table counts as read from
    its first row on.
    """
    limits = [_range_of_sequence(exported)]
    limits += [_limit(root, lookup) for lookup in _lookups(root)]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def _range_of_sequence(exported: ExportedProgram) -> int | None:
    tokens = [node for node in exported.graph.nodes if node.op == "placeholder"][-1].meta["val"]
    bounds = exported.range_constraints.get(tokens.shape[1].node.expr)
    upper = bounds.upper if bounds is not None else None
    return int(upper) if upper is not None and upper.is_Integer and int(upper) < 2**31 else None


def _lookups(root: fx.GraphModule) -> Iterator[Lookup]:
    """The lookups by position in tables of a fixed size, each table and index once."""
    says, seen = token_dependent(root.graph), set[Lookup]()
    for node in root.graph.nodes:
        for table, dim, index in _read(node):
            size = table.meta["val"].shape[dim]
            if isinstance(size, int) and index not in says and _is_integer(index):
                found = Lookup(size, index, wraps=node.target is aten.index.Tensor)
                if found not in seen:
                    seen.add(found)
                    yield found


def _read(node: fx.Node) -> list[tuple[fx.Node, int, fx.Node]]:
    """What a node looks up: table, dim, index."""
    args: tuple[Any, ...] = node.args
    if node.target is aten.embedding.default:
        return [(args[0], 0, args[1])]
    if node.target in (aten.index_select.default, aten.gather.default):
        return [(args[0], args[1], args[2])]
    if node.target is aten.index.Tensor:
        return [(args[0], dim, index) for dim, index in enumerate(args[1]) if index is not None]
    return []


def _is_integer(node: fx.Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32)


def _limit(root: fx.GraphModule, lookup: Lookup) -> int | None:
    """The longest sequence whose index stays inside; None when it never leaves."""
    positions = _Positions(root, lookup)
    if not positions.known:
        return lookup.rows if positions.dims(lookup.index) else None
    inside, outside = 0, 1
    while positions.within(outside):
        inside, outside = outside, 2 * outside
        if inside > 2 * lookup.rows:  # two positions and more for a row: a bucket, or a constant
            return None
    while outside - inside > 1:
        middle = (inside + outside) // 2
        inside, outside = (middle, outside) if positions.within(middle) else (inside, middle)
    return inside


class _Positions:
    """An index as a function of the length of the sequence."""

    def __init__(self, root: fx.GraphModule, lookup: Lookup) -> None:
        tokens = placeholder(root.graph)
        self.batch, self.sequence = (size.node.expr for size in tokens.meta["val"].shape)
        self.lookup, self.shape = lookup, lookup.index.meta["val"].shape
        needed = _ancestors(lookup.index)
        self.graph = _alone(root, lookup.index, needed)
        values = [*self.graph.parameters(), *self.graph.buffers()]
        self.known = max(map(self.dims, needed)) <= 1 and not any(value.is_meta for value in values)

    def dims(self, node: fx.Node) -> int:
        """How many dims of a value grow with the sequence."""
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, Tensor) else ()
        return sum(isinstance(s, torch.SymInt) and self.sequence in s.node.expr.free_symbols for s in sizes)

    def within(self, length: int) -> bool:
        """Whether the index of a sequence of this length has all its entries, and all in the table."""
        try:
            found = self.graph(torch.zeros(1, length, dtype=torch.long))
        except (IndexError, RuntimeError):
            return False
        sizes = [self._size(size, length) for size in self.shape]
        return list(found.shape) == sizes and self.lookup.holds(found)

    def _size(self, size: int | torch.SymInt, length: int) -> int:
        if isinstance(size, int):
            return size
        return int(size.node.expr.subs({self.batch: 1, self.sequence: length}))


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found, waiting = set[fx.Node](), [node]
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            waiting += one.all_input_nodes
    return found


def _alone(root: fx.GraphModule, index: fx.Node, needed: set[fx.Node]) -> fx.GraphModule:
    """tokens → index, on the CPU."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in root.graph.nodes:
        if node in needed or node is placeholder(root.graph):
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[index])
    alone = graph_module(root, graph)
    on_device(alone, torch.device("cpu"))
    return alone
