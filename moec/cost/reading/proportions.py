"""Which part of an operand's sizes a result has: how axes get from marked values to those without a mark.

Proposals only: `SizeReader` takes one where it is the number that stands in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from moec.cost.reading.kinds import kind_of
from moec.cost.reading.value import Sizes, Value
from moec.cost.symbols import symbol
from moec.ir.patterns import arguments_of

Proposal = Sequence[sympy.Expr | None]


def proposed(node: fx.Node, operands: Sequence[Value], count: int, ranks: Mapping[str, int]) -> Proposal:
    """For each of `count` dims of a result of `node` an expression, or None; `ranks`: those of each axis."""
    nothing: Proposal = (None,) * count
    if not isinstance(node.target, torch._ops.OpOverload) or not any(value.sizes for value in operands):
        return nothing
    name = node.target._schema.name
    rule = _RULES.get(name)
    if rule is not None:
        found = rule(node, [value.sizes or () for value in operands], ranks)
        return found if len(found) == count else nothing
    if kind_of(name) in ("view", "product", "attention"):
        return nothing
    # What operators of moec have beside their first operand are tables and weights, of other dims.
    alike = operands[:1] if name.startswith("moec::") else operands
    return _aligned([value.sizes or () for value in alike], count)


def _aligned(operands: Sequence[Sizes], count: int) -> Proposal:
    """Of operands that are broadcast: from the right, the first that has an axis in it."""
    found: list[sympy.Expr | None] = [None] * count
    for sizes in operands:
        for place in range(1, min(len(sizes), count) + 1):
            if found[-place] is None and sizes[-place].free_symbols:
                found[-place] = sizes[-place]
    return found


def _rows_through(place: int) -> Callable[..., Proposal]:
    """The last dim is that of the weight's dim `place`."""

    def rule(_: fx.Node, operands: Sequence[Sizes], __: Mapping[str, int]) -> Proposal:
        return (*(None,) * (len(operands[0]) - 1), operands[1][place])

    return rule


def _pieces(node: fx.Node, operands: Sequence[Sizes], _: Mapping[str, int]) -> Proposal:
    """Of a dim that is cut, the same part as of the number."""
    whole, meta = node.all_input_nodes[0].meta.get("val"), node.meta["val"]
    piece = meta[0] if isinstance(meta, list | tuple) else meta
    if whole is None:
        return (None,) * len(piece.shape)
    return [
        size * sympy.Rational(part, full) if isinstance(part, int) and isinstance(full, int) else None
        for size, part, full in zip(operands[0], piece.shape, whole.shape, strict=True)
    ]


def _sum(node: fx.Node, operands: Sequence[Sizes], _: Mapping[str, int]) -> Proposal:
    _input, dims, keep, *_rest = arguments_of(node) if len(arguments_of(node)) > 2 else (None, None, False)
    count = len(operands[0])
    left_out = {dim % count for dim in dims or range(count)}
    if keep:
        return [None if dim in left_out else size for dim, size in enumerate(operands[0])]
    return [size for dim, size in enumerate(operands[0]) if dim not in left_out]


def _turned(_: fx.Node, operands: Sequence[Sizes], __: Mapping[str, int]) -> Proposal:
    return operands[0][::-1]


def _gathered(node: fx.Node, operands: Sequence[Sizes], _: Mapping[str, int]) -> Proposal:
    first, *rest = operands[0]
    return (first * symbol(str(arguments_of(node)[2])), *rest)


def _same(_: fx.Node, operands: Sequence[Sizes], __: Mapping[str, int]) -> Proposal:
    return operands[0]


def _unflattened(node: fx.Node, operands: Sequence[Sizes], ranks: Mapping[str, int]) -> Proposal:
    """A table by rank and expert: the first numbers are axes, what is left is what they leave of the dim."""
    _input, dim, numbers = arguments_of(node)
    sizes = list(operands[0])
    dim %= len(sizes)
    if not all(isinstance(number, int) for number in numbers):
        return (None,) * (len(sizes) + len(numbers) - 1)
    axes, rest, made = _axes_of(node.graph, sizes[dim]), sizes[dim], []
    for number in numbers[:-1]:
        axis = next((axis for axis in axes if ranks.get(axis) == number), None)
        made.append(symbol(axis) if axis else sympy.Integer(number))
        axes = [other for other in axes if other != axis]
        rest /= made[-1]
    return [*sizes[:dim], *made, rest, *sizes[dim + 1 :]]


def _axes_of(graph: fx.Graph, size: sympy.Expr) -> list[str]:
    """The axes of a region's collectives: those in `size`, in their order, then those of exchanges."""
    found: dict[str, bool] = {}
    for node in graph.nodes:
        if node.op == "call_function" and kind_of(_name(node)) == "collective":
            declared = node.target._schema.arguments
            named = dict(zip([one.name for one in declared], arguments_of(node), strict=True))
            axis = str(named.get("axis") or named.get("group_name"))
            found[axis] = found.get(axis, False) or _name(node) == "moec::exchange"
    inside = [axis for axis in found if symbol(axis) in size.free_symbols]
    others = sorted((axis for axis in found if axis not in inside), key=lambda axis: not found[axis])
    return [*inside, *others]


def _name(node: fx.Node) -> Any:
    target = node.target
    return target._schema.name if isinstance(target, torch._ops.OpOverload) else "operator::none"


_RULES: dict[str, Callable[..., Proposal]] = {
    "aten::linear": _rows_through(0),
    "moec::linear": _rows_through(0),
    "moec::grouped_linear": _rows_through(1),
    **{f"aten::{name}": _pieces for name in ("chunk", "split", "split_with_sizes", "slice")},
    "aten::sum": _sum,
    "aten::t": _turned,
    "aten::unflatten": _unflattened,
    "_c10d_functional::all_gather_into_tensor": _gathered,
    "_c10d_functional::all_to_all_single": _same,
}
