"""What each value of a graph is: a tensor, a size, a list of tensors.

Read off the operators' schemas alone, so the printer, which has a graph, and the parser, which is only just
building one, come to the same answer. `overloads.resolve` needs it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx
from torch._ops import OpOverload

from .overloads import Kind, kind_of, kind_of_return
from .vocabulary import SIZE_FUNCTIONS

INFIX_SIZES: dict[Any, str] = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.truediv: "/", operator.floordiv: "//",
    operator.mod: "%", operator.pow: "**", operator.eq: "==", operator.ne: "!=", operator.lt: "<",
    operator.le: "<=", operator.gt: ">", operator.ge: ">=", operator.and_: "&", operator.or_: "|",
}  # fmt: skip
_COMPARISONS = ("==", "!=", "<", "<=", ">", ">=")
NUMBERS = ("int", "float", "bool")


def kind_of_call(target: Any, args: Sequence[Any], kinds: Mapping[fx.Node, Kind]) -> Kind:
    """The kind of what calling `target` (an overload, or a function on sizes) gives; 'unknown' for others."""
    if isinstance(target, OpOverload):
        return kind_of_return(target)
    if target is operator.getitem:
        return _item(kind_of(args[0], kinds), args[1])
    symbol = INFIX_SIZES.get(target)
    if symbol in _COMPARISONS or target is SIZE_FUNCTIONS.get("sym_not"):
        return "bool"
    if symbol == "/" or target is SIZE_FUNCTIONS.get("sym_float"):
        return "float"
    if symbol is not None or target is operator.neg or target in SIZE_FUNCTIONS.values():
        return "float" if any(kind_of(arg, kinds) == "float" for arg in args) else "int"
    return "unknown"


def _item(container: Kind, index: Any) -> Kind:
    if container == "tensors":
        return "tensor"
    if isinstance(container, tuple) and type(index) is int and -len(container) <= index < len(container):
        return container[index]
    return "unknown"


def infer_kinds(
    graph: fx.Graph, inputs: Sequence[Kind], call: Callable[[fx.Node, tuple[Kind, ...]], Kind]
) -> tuple[dict[fx.Node, Kind], Kind]:
    """The kind of every node, and of what the graph returns.

    `inputs`: kinds of the placeholders, those beyond its end are tensors. `call(node, kinds)`: what a region
    called with arguments of these kinds returns.
    """
    kinds: dict[fx.Node, Kind] = {}
    given = list(inputs)
    returned: Kind = "none"
    for node in graph.nodes:
        if node.op == "placeholder":
            kinds[node] = given.pop(0) if given else "tensor"
        elif node.op == "get_attr":
            kinds[node] = kind_of_attribute(str(node.target))
        elif node.op == "call_module":
            kinds[node] = call(node, tuple(kind_of(arg, kinds) for arg in node.args))
        elif node.op == "output":
            returned = kind_of(node.args[0], kinds)
        else:
            kinds[node] = (
                kind_of_call(node.target, node.args, kinds) if node.op == "call_function" else "unknown"
            )
    return kinds, returned


def kind_of_attribute(target: str) -> Kind:
    """Weights are tensors; `training` is the one Python value a graph reads."""
    return "bool" if target == "training" else "tensor"
