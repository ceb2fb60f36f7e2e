"""Read what stands between the up products and the down product of an expert layer as a formula.

before:  h_1 = silu(gate);  h_2 = h_1 * up                                the nodes from `gate`, `up` to `h_2`
after:   lambda gate, up: silu(gate) * up

Every operator has its word or its sign; changes of shape that pick a part of the last dim become slices.
What has none (dropout, a weight, a sum over units) is refused, with the node and the reason.
"""

from __future__ import annotations

import keyword
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moec.ir.patterns import argument, is_call, tensor
from moec.runtime.ops.formula import GRADIENT, Formula
from moec.runtime.ops.formula_functions import FUNCTIONS, LARGEST_POWER
from moec.runtime.ops.formula_tree import Call, Expression, Leaf, Number, part_of

from .fusion_notes import DeclinedError

aten = torch.ops.aten
LARGEST = 200  # calls in one formula

# Operators that are one word or sign, argument for argument.
WORDS = {
    aten.neg.default: "neg", aten.mul.Tensor: "mul", aten.div.Tensor: "div", aten.exp.default: "exp",
    aten.log.default: "log", aten.sqrt.default: "sqrt", aten.rsqrt.default: "rsqrt",
    aten.reciprocal.default: "reciprocal", aten.tanh.default: "tanh", aten.erf.default: "erf",
    aten.sigmoid.default: "sigmoid", aten.abs.default: "abs", aten.relu.default: "relu",
    aten.relu6.default: "relu6", aten.silu.default: "silu", aten.mish.default: "mish",
    aten.hardsigmoid.default: "hardsigmoid", aten.hardswish.default: "hardswish",
    aten.maximum.default: "maximum", aten.minimum.default: "minimum", aten.mul.Scalar: "mul",
    aten.div.Scalar: "div",
}  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """The parts that `chunk`, `split` or `unbind` make of the last dim."""

    items: tuple[Expression, ...]


@dataclass(frozen=True)
class Grid:
    """The last dim of `expression`, unflattened to `rows` by `columns`."""

    expression: Expression
    rows: int
    columns: int


def read_inner(ups: Sequence[fx.Node], last: fx.Node) -> Formula:
    """The formula from the products `ups` to `last`; raises `DeclinedError`."""
    reader = _Reader(ups)
    body = reader.value(last)
    if not isinstance(body, Leaf | Call):
        raise DeclinedError(f"`{last.name}` is not a value of the hidden units")
    if _size(body) > LARGEST:
        raise DeclinedError(f"more than {LARGEST} operators between the products")
    return Formula(tuple(reader.names.values()), body)


def _size(expression: Expression) -> int:
    return 1 + sum(map(_size, expression.arguments)) if isinstance(expression, Call) else 1


class _Reader:
    """Expressions for nodes, each read once."""

    def __init__(self, ups: Sequence[fx.Node]) -> None:
        self.names = _parameter_names(ups)
        self.known: dict[fx.Node, Any] = {node: Leaf(name) for node, name in self.names.items()}

    def value(self, node: Any) -> Any:
        """The expression (or parts) that a node stands for; numbers stand for themselves."""
        if isinstance(node, int | float) and not isinstance(node, bool):
            return Number(node)
        if not isinstance(node, fx.Node):
            raise DeclinedError(f"{node!r} is not a number")
        if node not in self.known:
            self.known[node] = self._read(node)
        return self.known[node]

    def _read(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            raise DeclinedError(f"`{node.target}` is read between the products")
        if is_call(node, aten.dropout.default):
            raise DeclinedError(f"`{node.name}` is dropout between the products, which draws numbers")
        if node.target in WORDS:
            return self._called(WORDS[node.target], [self.value(value) for value in node.args], node)
        read = _READERS.get(node.target)
        if read is None:
            raise DeclinedError(f"`{node.name}` ({_shown(node)}) has no word in formulas")
        return read(self, node)

    def expression(self, node: Any) -> Expression:
        """As `value`, for what must not be a parted value."""
        found = self.value(node)
        if not isinstance(found, Leaf | Call | Number):
            raise DeclinedError(f"`{node.name}` has one dim more than the rows")
        return found

    def _called(self, word: str, arguments: list[Any], node: fx.Node) -> Expression:
        if not all(isinstance(a, Leaf | Call | Number) for a in arguments) or node.kwargs:
            raise DeclinedError(f"`{node.name}` ({_shown(node)}) is not pointwise over the hidden units")
        return Call(word, tuple(arguments))

    # operators with options

    def sum(self, node: fx.Node) -> Expression:
        sign = "add" if node.target is aten.add.Tensor else "sub"
        left, right = (self.expression(value) for value in node.args[:2])
        factor = argument(node, 2, "alpha", 1)
        return Call(sign, (left, right if factor == 1 else Call("mul", (right, Number(factor)))))

    def reversed(self, node: fx.Node) -> Expression:
        if argument(node, 2, "alpha", 1) != 1:
            raise DeclinedError(f"`{node.name}` is a difference with a factor")
        return Call("sub", (self.expression(node.args[1]), self.expression(node.args[0])))

    def power(self, node: fx.Node) -> Expression:
        exponent: Any = 2 if node.target is aten.square.default else node.args[1]
        if exponent != int(exponent) or not 2 <= exponent <= LARGEST_POWER:
            needed = f"a formula has whole ones, 2 to {LARGEST_POWER}"
            raise DeclinedError(f"`{node.name}` is the power {exponent}; {needed}")
        return Call("pow", (self.expression(node.args[0]), Number(int(exponent))))

    def gelu(self, node: fx.Node) -> Expression:
        word = {"none": "gelu", "tanh": "gelu_tanh"}[argument(node, 1, "approximate", "none")]
        return Call(word, (self.expression(node.args[0]),))

    def leaky(self, node: fx.Node) -> Expression:
        return Call(
            "leaky_relu", (self.expression(node.args[0]), Number(argument(node, 1, "negative_slope", 0.01)))
        )

    def plain(self, node: fx.Node) -> Expression:
        """`elu` and `softplus`, which have a word for their default options alone."""
        word = str(node.target._opname)  # type: ignore[union-attr]
        declared = node.target._schema.arguments[1:]  # type: ignore[union-attr]
        options = [argument(node, i, a.name, a.default_value) for i, a in enumerate(declared, 1)]
        if options != [a.default_value for a in declared]:
            raise DeclinedError(f"`{node.name}` is {word} with options {options}")
        return Call(word, (self.expression(node.args[0]),))

    def clamp(self, node: fx.Node) -> Expression:
        low, high = _bounds(node)
        found = self.expression(node.args[0])
        for word, bound in (("clamp_min", low), ("clamp_max", high)):
            found = found if bound is None else Call(word, (found, Number(bound)))
        return found

    # parts of the last dim

    def slice(self, node: fx.Node) -> Expression:
        source = self.expression(node.args[0])
        if argument(node, 1, "dim", 0) not in (-1, _dims(node.args[0]) - 1):
            raise DeclinedError(f"`{node.name}` is a slice of rows")
        width = _width(node.args[0])
        wanted = slice(*(argument(node, i, name) for i, name in ((2, "start"), (3, "end"), (4, "step"))))
        start, stop, step = wanted.indices(width)
        return part_of(source, Leaf("", start, None if stop >= width else stop, step))

    def parts(self, node: fx.Node) -> Parts:
        source, width = self.expression(node.args[0]), _width(node.args[0])
        if argument(node, 2, "dim", 0) not in (-1, _dims(node.args[0]) - 1):
            raise DeclinedError(f"`{node.name}` parts the rows")
        ends, items = 0, []
        for size in _part_sizes(node, width):
            stop = ends + size
            items.append(part_of(source, Leaf("", ends, None if stop >= width else stop)))
            ends = stop
        return Parts(tuple(items))

    def grid(self, node: fx.Node) -> Grid:
        source, (rows, columns) = self.expression(node.args[0]), node.meta["val"].shape[-2:]
        if argument(node, 1, "dim", 0) not in (-1, _dims(node.args[0]) - 1) or len(node.args[2]) != 2:  # type: ignore[arg-type]
            raise DeclinedError(f"`{node.name}` ({_shown(node)}) is not a grid of the hidden units")
        return Grid(source, int(rows), int(columns))

    def picked(self, node: fx.Node) -> Expression:
        """`select`, or an item of a parted value."""
        source = self.value(node.args[0])
        place: Any = argument(node, 2, "index") if node.target is aten.select.int else node.args[1]
        if isinstance(source, Parts) and node.target is operator.getitem:
            return source.items[place]
        if isinstance(source, Grid) and node.target is aten.select.int:
            return _line(source, argument(node, 1, "dim", 0) - _dims(node.args[0]), place)
        raise DeclinedError(f"`{node.name}` ({_shown(node)}) picks rows")

    def lines(self, node: fx.Node) -> Parts:
        """`unbind` of a grid."""
        source = self.value(node.args[0])
        if not isinstance(source, Grid):
            raise DeclinedError(f"`{node.name}` takes the rows apart")
        dim = argument(node, 1, "dim", 0)
        back = dim if dim < 0 else dim - _dims(node.args[0])
        count = {-2: source.rows, -1: source.columns}.get(back, 0)
        return Parts(tuple(_line(source, back, place) for place in range(count)))

    def same(self, node: fx.Node) -> Any:
        return self.value(node.args[0])


def _bounds(node: fx.Node) -> tuple[Any, Any]:
    """Least and largest value that a clamp leaves, None where it has none."""
    if node.target is aten.hardtanh.default:
        return argument(node, 1, "min_val", -1), argument(node, 2, "max_val", 1)
    if node.target is aten.clamp_min.default:
        return argument(node, 1, "min"), None
    if node.target is aten.clamp_max.default:
        return None, argument(node, 1, "max")
    return argument(node, 1, "min"), argument(node, 2, "max")


def _line(grid: Grid, dim: int, place: int) -> Expression:
    """Row (dim -2) or column (dim -1) number `place` of a grid, as a slice."""
    if dim == -2:
        start = place % grid.rows * grid.columns
        stop = start + grid.columns
        return part_of(grid.expression, Leaf("", start, None if stop == grid.rows * grid.columns else stop))
    if dim == -1:
        return part_of(grid.expression, Leaf("", place % grid.columns, None, grid.columns))
    raise DeclinedError("rows are picked between the products")


def _part_sizes(node: Any, width: int) -> list[int]:
    if is_call(node, aten.split_with_sizes.default):
        return [int(size) for size in node.args[1]]
    given = int(node.args[1])
    size = -(-width // given) if is_call(node, aten.chunk.default) else given
    return [min(size, width - start) for start in range(0, width, size)]


def _dims(node: Any) -> int:
    value = tensor(node)
    assert value is not None
    return value.dim()


def _width(node: Any) -> int:
    value = tensor(node)
    assert value is not None
    return int(value.shape[-1])


def _shown(node: fx.Node) -> str:
    return str(node.target).removesuffix(".default").removesuffix(".Tensor")


def _parameter_names(ups: Sequence[fx.Node]) -> dict[fx.Node, str]:
    """A parameter for each up product: its name in the graph, where that means nothing else."""
    names: dict[fx.Node, str] = {}
    for node in ups:
        name = node.name
        while name in FUNCTIONS or keyword.iskeyword(name) or name == GRADIENT or name in names.values():
            name += "_"
        names[node] = name
    return names


_READERS: dict[Any, Callable[[_Reader, fx.Node], Any]] = {
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor), _Reader.sum),
    aten.rsub.Scalar: _Reader.reversed,
    **dict.fromkeys((aten.pow.Tensor_Scalar, aten.square.default), _Reader.power),
    aten.gelu.default: _Reader.gelu,
    aten.leaky_relu.default: _Reader.leaky,
    **dict.fromkeys((aten.elu.default, aten.softplus.default), _Reader.plain),
    **dict.fromkeys((aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default), _Reader.clamp),
    aten.hardtanh.default: _Reader.clamp,
    aten.slice.Tensor: _Reader.slice,
    **dict.fromkeys((aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default), _Reader.parts),
    aten.unflatten.int: _Reader.grid,
    **dict.fromkeys((aten.select.int, operator.getitem), _Reader.picked),
    aten.unbind.int: _Reader.lines,
    aten.clone.default: _Reader.same,
}
