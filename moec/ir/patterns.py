"""Reading a graph: what a node computes, whose users it has, whether shapes agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from .graphs import placeholder
from .identity import made_from

aten = torch.ops.aten

CASTS = {aten.to.dtype, aten._to_copy.default}


def is_call(value: object, *targets: object) -> bool:
    """Whether `value` is a node that calls one of `targets`."""
    return isinstance(value, fx.Node) and value.op == "call_function" and value.target in targets


def tensor(node: object) -> Tensor | None:
    """The fake tensor a node stands for, or None."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument by position or keyword."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def arguments_of(node: fx.Node) -> tuple[Any, ...]:
    """Every argument of a call to an operator, by position, defaults filled in."""
    declared = node.target._schema.arguments  # type: ignore[union-attr]
    return tuple(argument(node, i, a.name, a.default_value) for i, a in enumerate(declared))


def inputs(node: Any) -> tuple[Any, Any]:
    """The first two arguments of a call, as values to be asked with `is_call` and `tensor`."""
    return node.args[0], node.args[1]


def same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are the same number for every batch and sequence (no guard is added)."""
    return str(a) == str(b)


def same_shape(a: Iterable[Any], b: Iterable[Any]) -> bool:
    """Whether two shapes agree, symbol by symbol."""
    a, b = list(a), list(b)
    return len(a) == len(b) and all(map(same_size, a, b))


def static(sizes: Iterable[Any]) -> bool:
    """Whether every size is a plain number."""
    return all(isinstance(s, int) or s.node.expr.is_number for s in sizes)


def replace(node: fx.Node, value: fx.Node, *, keep: fx.Node | None = None) -> None:
    """Let every user of `node` (but `keep`) read `value`, and erase `node` once nobody reads it."""
    node.replace_all_uses_with(value, delete_user_cb=lambda user: user is not keep, propagate_meta=False)
    if not node.users:
        node.graph.erase_node(node)


def call(
    before: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> fx.Node:
    """Insert a call before `before`, made from it (its place in the user's model too), with a fresh shape."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args, kwargs or {})
    made_from(node, before).meta["val"] = _shape(node)
    return node


def _shape(node: fx.Node) -> Any:
    """The fake result of `node`, from its arguments' fakes (of one made of sizes alone, in the tokens'
    mode)."""
    inputs = [*node.all_input_nodes, placeholder(node.graph)]
    mode = next((mode for mode in map(_fake_mode, inputs) if mode is not None), None)
    if mode is None:
        return None
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with mode:
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _fake_mode(node: fx.Node) -> Any:
    return getattr(node.meta.get("val"), "fake_mode", None)


def through(value: fx.Node, *targets: object) -> fx.Node:
    """Follow the first argument back through calls to `targets` that have a single user."""
    while is_call(value, *targets):
        value = value.args[0]  # type: ignore[assignment]
    return value


def uncast(value: fx.Node) -> fx.Node:
    """`value` with casts in front of it taken off."""
    return through(value, *CASTS)


def only_user(node: fx.Node) -> fx.Node | None:
    """The single user of a node, or None when it has none or several."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def for_each(graph: fx.Graph, rewrite: Callable[[fx.Node], None]) -> None:
    """Apply `rewrite` to every call in graph order; nodes erased on the way are passed over."""
    for node in list(graph.nodes):
        if node.op == "call_function" and not node._erased:
            rewrite(node)
