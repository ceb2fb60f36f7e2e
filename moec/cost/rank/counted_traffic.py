"""What a rank will send to other ranks, read off the partitioned graph: nothing runs, nothing is sent.

The graph is walked once for all ranks together, as its text is the same for all of them. Of most values only
the shape counts, which the graph knows in terms of batch and sequence. What is data is how many rows go to
which expert: these tables [E] are given, and the arithmetic with them that stands in the graph (sums, turns,
their own exchange between ranks) is done as it stands there, so the sizes of every exchange follow.

Backward is the transpose of each collective whose input needs a gradient.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from moec.errors import OperatorError
from moec.ir.graphs import attribute
from moec.ir.mesh import Mesh
from moec.runtime.ops.sent import (
    BACKWARD,
    FORWARD,
    Kind,
    Sent,
    Traffic,
    all_gather_cost,
    all_reduce_cost,
    all_to_all_cost,
    reduce_scatter_cost,
)


def predict_traffic(
    graph: fx.GraphModule,
    mesh: Mesh,
    sizes: Sequence[tuple[int, int]],
    routed: Sequence[Sequence[Tensor]],
    *,
    backward: bool = True,
) -> list[Traffic]:
    """The traffic of every rank, for one run of the partitioned `graph` (and its gradient, if `backward`).

    `sizes`: batch and sequence of each rank; `routed`: for each rank, the rows i64 [E] it sends to each
    expert, one table an expert layer in the order of the graph (as `Traffic.routed` of a run). Raises
    `OperatorError` for a collective whose sizes follow from neither.
    """
    walk = _Walk(mesh, sizes, routed, backward)
    walk.run(graph, [_Value(False)])
    return walk.traffic


def compared(counted: Traffic, predicted: Traffic) -> list[Kind]:
    """The kinds of traffic of which not as much was counted as was predicted, or the other way round."""
    kinds = counted.sent.keys() | predicted.sent.keys()
    return sorted(kind for kind in kinds if counted.sent.get(kind) != predicted.sent.get(kind))


@dataclass(frozen=True)
class _Value:
    """A value on all ranks: `table` is its numbers, rank by rank, where they are known."""

    needs_grad: bool
    table: tuple[Any, ...] | None = None


class _Walk:
    """One walk over a graph and its regions."""

    def __init__(
        self, mesh: Mesh, sizes: Sequence[tuple[int, int]], routed: Sequence[Sequence[Tensor]], backward: bool
    ) -> None:
        self.mesh, self.sizes, self.backward = mesh, sizes, backward
        self.routed = [iter(tables) for tables in routed]
        self.traffic = [Traffic() for _ in sizes]
        self.symbols: dict[Any, int] = {}

    def run(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        """What `module` returns for the values `inputs`."""
        known: dict[fx.Node, Any] = {}
        given = iter(inputs)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                known[node] = next(given)
                self._learn_symbols(node)
            elif node.op == "get_attr":
                value = attribute(module, str(node.target))
                known[node] = _Value(isinstance(value, Tensor) and value.requires_grad)
            elif node.op == "call_module":
                arguments = fx.map_arg(node.args, known.__getitem__)
                known[node] = self.run(_region(module, node), arguments)
            elif node.op == "call_function":
                known[node] = self._call(node, known)
        return fx.map_arg(module.graph.output_node().args[0], known.__getitem__)

    def _learn_symbols(self, node: fx.Node) -> None:
        """The symbols of batch and sequence, from the tokens."""
        if not self.symbols:
            batch, sequence = node.meta["val"].shape
            self.symbols = {batch.node.expr: 0, sequence.node.expr: 1}

    def _call(self, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        inputs = [known[other] for other in node.all_input_nodes]
        if node.target is operator.getitem:
            (source,) = inputs
            if isinstance(source, _Value):
                return _Value(source.needs_grad and _is_float(node))
            return source[node.args[1]]
        name = _operator(node)
        if name in ("moec.admit", "moec.assign"):
            return self._routing(node)
        if name in _COLLECTIVES:
            return self._collective(node, name, known)
        needs_grad = any(_needs_grad(value) for value in inputs) and _is_float(node)
        return _Value(needs_grad, self._numbers(node, known) if not needs_grad else None)

    def _routing(self, node: fx.Node) -> list[_Value]:
        """Of a table of slots, the rows by expert are known; the others are known by shape."""
        counts = tuple(next(tables) for tables in self.routed)
        return [_Value(False), _Value(False, counts), _Value(False)][: len(node.meta["val"])]

    def _numbers(self, node: fx.Node, known: dict[fx.Node, Any]) -> tuple[Any, ...] | None:
        """The numbers of every rank, where those of all arguments are known."""
        values = [known[other] for other in node.all_input_nodes]
        if not values or not all(isinstance(value, _Value) and value.table for value in values):
            return None
        assert callable(node.target)
        at = [lambda other, rank=rank: known[other].table[rank] for rank in range(len(self.sizes))]
        return tuple(node.target(*fx.map_arg(node.args, get), **fx.map_arg(node.kwargs, get)) for get in at)

    def _collective(self, node: fx.Node, name: str, known: dict[fx.Node, Any]) -> _Value:
        named = _named(node)
        source = known[node.all_input_nodes[0]]
        axis = str(named.get("axis", named.get("group_name")))
        for rank, traffic in enumerate(self.traffic):
            group = self.mesh.group(axis, rank)
            call = _Call(self, node, named, known, rank, len(group), group.index(rank))
            there, back = _COLLECTIVES[name](call)
            if there is not None:
                traffic.add(Kind(FORWARD, axis, name), there)
            if back is not None and self.backward and source.needs_grad:
                traffic.add(Kind(BACKWARD, axis, _TRANSPOSED.get(name, name)), back)
        return _Value(source.needs_grad, self._sent_numbers(name, axis, source, named))

    def _sent_numbers(
        self, name: str, axis: str, source: _Value, named: dict[str, Any]
    ) -> tuple[Any, ...] | None:
        """What comes of a collective on numbers that are known."""
        if source.table is None or name not in ("all_to_all_single", "all_gather_into_tensor"):
            return None
        made = []
        for rank in range(len(self.sizes)):
            group = self.mesh.group(axis, rank)
            parts = [source.table[other] for other in group]
            if name == "all_to_all_single":
                parts = [part.split(named["input_split_sizes"])[group.index(rank)] for part in parts]
            made.append(torch.cat(parts))
        return tuple(made)


@dataclass(frozen=True)
class _Call:
    """One collective as one rank sees it."""

    walk: _Walk
    node: fx.Node
    named: dict[str, Any]
    known: dict[fx.Node, Any]
    rank: int
    ranks: int
    place: int

    def rows(self, name: str) -> list[int]:
        """The numbers of an argument, one a rank."""
        value = self.named[name]
        table = self.known[value].table if isinstance(value, fx.Node) else None
        if table is None:
            raise OperatorError(
                self.node.name, f"'{name}' is not known", "numbers that follow from the routing"
            )
        rows: list[int] = table[self.rank].tolist()
        return rows

    def number(self, name: str) -> int:
        """A number, or the size that stands for it."""
        value = self.named[name]
        return self._size(value.meta["val"]) if isinstance(value, fx.Node) else int(value)

    def num_bytes(self, name: str = "input") -> int:
        """The bytes of a tensor argument."""
        shape, itemsize = self._shape(name)
        return torch.Size([self._size(size) for size in shape]).numel() * itemsize

    def row_bytes(self, name: str) -> int:
        """The bytes of one row of a tensor argument [N, D]."""
        shape, itemsize = self._shape(name)
        return torch.Size([self._size(size) for size in shape[1:]]).numel() * itemsize

    def _shape(self, name: str) -> tuple[Sequence[Any], int]:
        value = self.named[name].meta["val"]
        return value.shape, value.dtype.itemsize

    def _size(self, size: Any) -> int:
        """A size with this rank's batch and sequence in it."""
        if isinstance(size, int):
            return size
        own = {symbol: self.walk.sizes[self.rank][which] for symbol, which in self.walk.symbols.items()}
        found = size.node.expr.subs(own)
        if not found.is_Integer:
            raise OperatorError(self.node.name, f"a size {size}", "sizes that follow from batch and sequence")
        return int(found)


Both = tuple[Sent | None, Sent | None]


def _all_reduce(call: _Call) -> Both:
    sent = all_reduce_cost(call.ranks, call.num_bytes())
    return sent, sent


def _all_gather(call: _Call) -> Both:
    num_bytes = call.num_bytes()
    return all_gather_cost(call.ranks, num_bytes), reduce_scatter_cost(call.ranks, num_bytes * call.ranks)


def _reduce_scatter(call: _Call) -> Both:
    num_bytes = call.num_bytes()
    return reduce_scatter_cost(call.ranks, num_bytes), all_gather_cost(call.ranks, num_bytes // call.ranks)


def _all_to_all(call: _Call) -> Both:
    sends, receives = call.named["input_split_sizes"], call.named["output_split_sizes"]
    row = call.row_bytes("input")
    return all_to_all_cost(call.place, sends, row), all_to_all_cost(call.place, receives, row)


def _exchange(call: _Call) -> Both:
    row = call.row_bytes("rows")
    sends, receives = call.rows("send"), call.rows("receive")
    return all_to_all_cost(call.place, sends, row), all_to_all_cost(call.place, receives, row)


def _gather_rows(call: _Call) -> Both:
    sizes, row = call.rows("sizes"), call.row_bytes("rows")
    own = [sizes[call.place]] * call.ranks
    return all_to_all_cost(call.place, own, row), all_to_all_cost(call.place, sizes, row)


def _scatter_rows(call: _Call) -> Both:
    there, back = _gather_rows(call)
    return back, there


def _unshare(call: _Call) -> Both:
    longest = -(-call.number("num_rows") // call.ranks) * call.row_bytes("y")
    return all_gather_cost(call.ranks, longest), reduce_scatter_cost(call.ranks, longest * call.ranks)


_COLLECTIVES: dict[str, Callable[[_Call], Both]] = {
    "all_reduce": _all_reduce,
    "all_gather_into_tensor": _all_gather,
    "reduce_scatter_tensor": _reduce_scatter,
    "all_to_all_single": _all_to_all,
    "moec.exchange": _exchange,
    "moec.gather_rows": _gather_rows,
    "moec.scatter_rows": _scatter_rows,
    "moec.unshare": _unshare,
}
# What the gradient of an operator is called by, where that is another one.
_TRANSPOSED = {
    "all_gather_into_tensor": "reduce_scatter_tensor",
    "reduce_scatter_tensor": "all_gather_into_tensor",
    "moec.gather_rows": "moec.scatter_rows",
    "moec.scatter_rows": "moec.gather_rows",
    "moec.unshare": "moec.sum_share",
}


def _operator(node: fx.Node) -> str:
    target = node.target
    if not isinstance(target, OpOverload) or target.namespace not in ("moec", "_c10d_functional"):
        return ""
    return f"moec.{target._opname}" if target.namespace == "moec" else target._opname


def _named(node: fx.Node) -> dict[str, Any]:
    """The arguments by name, defaults left out."""
    assert isinstance(node.target, OpOverload)
    return {
        a.name: value for a, value in zip(node.target._schema.arguments, node.args, strict=False)
    } | node.kwargs


def _region(module: fx.GraphModule, node: fx.Node) -> fx.GraphModule:
    region = module.get_submodule(str(node.target))
    assert isinstance(region, fx.GraphModule)
    return region


def _needs_grad(value: Any) -> bool:
    return isinstance(value, _Value) and value.needs_grad


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(one, Tensor) and one.is_floating_point() for one in values)
