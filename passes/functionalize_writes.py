"""Turn in-place operators into ones that return their result.

before:  add_ = add_(x, y);     z = f(x)
after:   add  = add(x, y);      z = f(add)

Assumes: the tensor written to has no other live view. A write through a view (`x[:, 1:].copy_(y)`) is refused.
Contract: exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from moec.errors import PassError
from moec.ir import Pass, Program

from moec.ir.graphs import drop_unused

aten = torch.ops.aten


@dataclass(frozen=True)
class FunctionalizeWrites(Pass):
    """See the module."""

    def requires(self, program: Program) -> None:
        for node in program.graph.graph.nodes:
            if writes(node) and (pure_form(node) is None or _is_view(node.args[0])):
                raise PassError(
                    f"{node.name} ({node.meta.get('source') or 'no source line'})", f"{node.target} writes through a view",
                    "in-place operators on values of their own, such as x += y",
                )  # fmt: skip

    def apply(self, program: Program) -> Program:
        for node in list(program.graph.graph.nodes):
            if writes(node):
                _rewrite(node)
        drop_unused(program.graph)
        return program


def writes(node: fx.Node) -> bool:
    """Whether a call mutates its first argument."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return node.target._schema.is_mutable


def pure_form(node: fx.Node) -> torch._ops.OpOverload | None:
    """`aten.add_.Tensor` → `aten.add.Tensor`, or None when there is no such operator."""
    assert isinstance(node.target, torch._ops.OpOverload)
    name = node.target._schema.name.split("::")[1]
    packet = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
    return getattr(packet, node.target._overloadname, None) if packet is not None else None


def _is_view(value: object) -> bool:
    """Whether `value` shares memory with an earlier value that is still read elsewhere."""
    if not isinstance(value, fx.Node) or value.op != "call_function":
        return True  # a write to an input or a weight
    target = value.target
    schema = getattr(target, "_schema", None)
    aliases = schema is not None and any(a.alias_info is not None for a in schema.arguments) and not schema.is_mutable
    return aliases and any(len(source.users) > 1 for source in value.all_input_nodes)


def _rewrite(node: fx.Node) -> None:
    written, graph = node.args[0], node.graph
    assert isinstance(written, fx.Node)
    order = {n: i for i, n in enumerate(graph.nodes)}
    node.target = pure_form(node)  # type: ignore[assignment]
    written.replace_all_uses_with(node, delete_user_cb=lambda user: order[user] > order[node], propagate_meta=False)
