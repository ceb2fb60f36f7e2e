"""Turn in-place operators into ones that return their result.

before:  add_ = add_(x, y);     z = f(x)
after:   add  = add(x, y);      z = f(add)

Assumes: the tensor written to has no other live view. A write through a view (`x[:, 1:].copy_(y)`) is
refused.
Contract: exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from moec.errors import PassError
from moec.ir import Pass, Program
from moec.ir.graphs import drop_unused, is_mutable

aten = torch.ops.aten


@dataclass(frozen=True)
class FunctionalizeWrites(Pass):
    """See the module."""

    def requires(self, program: Program) -> None:
        order = {node: i for i, node in enumerate(program.graph.graph.nodes)}
        for node in order:
            if is_mutable(node) and (pure_form(node) is None or _is_shared(node, order)):
                raise PassError(
                    f"{node.name} ({node.meta.get('source') or 'no source line'})",
                    f"{node.target} writes through a view",
                    "in-place operators on values of their own, such as x += y",
                )

    def apply(self, program: Program) -> Program:
        for node in list(program.graph.graph.nodes):
            if is_mutable(node):
                _rewrite(node)
        drop_unused(program.graph)
        return program


def pure_form(node: fx.Node) -> torch._ops.OpOverload | None:
    """`aten.add_.Tensor` → `aten.add.Tensor`, or None when there is no such operator."""
    assert isinstance(node.target, torch._ops.OpOverload)
    name = node.target._schema.name.split("::")[1]
    packet = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
    return getattr(packet, node.target._overloadname, None) if packet is not None else None


def _is_shared(write: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether what is written shows in another value that is still read: its base, or an earlier view."""
    written = write.args[0]
    return _is_view(written) or (isinstance(written, fx.Node) and _has_live_view(written, write, order))


def _is_view(value: object) -> bool:
    """Whether `value` shares memory with an earlier value that is still read elsewhere, or with an input."""
    while isinstance(value, fx.Node) and value.op == "call_function":
        if not _aliases(value):
            return False
        value = value.args[0]
        if isinstance(value, fx.Node) and len(value.users) > 1:
            return True
    return True


def _has_live_view(value: fx.Node, write: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether a view of `value` made before `write` is read after it."""
    for view in value.users:
        if order[view] < order[write] and _aliases(view):
            later = any(order[user] > order[write] for user in view.users)
            if later or _has_live_view(view, write, order):
                return True
    return False


def _aliases(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None or is_mutable(node):
        return False
    return any(argument.alias_info is not None for argument in schema.arguments)


def _rewrite(node: fx.Node) -> None:
    written, graph = node.args[0], node.graph
    assert isinstance(written, fx.Node)
    order = {n: i for i, n in enumerate(graph.nodes)}
    node.target = pure_form(node)  # type: ignore[assignment]
    written.replace_all_uses_with(
        node, delete_user_cb=lambda user: order[user] > order[node], propagate_meta=False
    )
