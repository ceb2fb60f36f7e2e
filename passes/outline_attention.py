"""Make every attention a region.

before:  q = linear(n, wq); …; y = scaled_dot_product_attention(q, k, v, mask); out = linear(flatten(y), wo)
after:   out = attention_3(n, mask, cos, sin)

An attention is found from its core: a `scaled_dot_product_attention`, or a softmax over positions whose
result is multiplied with values. It reaches forward to the output product and back to the one value all
projections read; norms of queries and keys and rotary products inside it belong to it, tables and masks come
in from outside.

Assumes: `outline_feed_forwards` ran. A core that is not closed stays in the root graph, and the ledger says
why.
Contract: exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moec.ir import Pass, Program, Region
from moec.ir.dependence import READS_SHAPE_ONLY, token_dependent
from moec.ir.graphs import drop_unused
from moec.ir.outline import (
    common_path,
    external_inputs,
    outline,
    parameter_only,
    relative_names,
    tensors_read,
)

aten = torch.ops.aten
PRODUCTS = {aten.matmul.default, aten.bmm.default}


@dataclass(frozen=True)
class OutlineAttention(Pass):
    """See the module."""

    def apply(self, program: Program) -> Program:
        root, index = program.graph, 0
        for core in [node for node in root.graph.nodes if _is_core(node)]:
            if core._erased:
                continue
            found = _read(root.graph, core)
            if isinstance(found, str):
                program.ledger = program.ledger.note(
                    f"attention at `{core.name}` stays in the root graph: {found}"
                )
                continue
            _outline(program, found, index)
            index += 1
        _name_the_head(program)
        drop_unused(root)
        return program


@dataclass
class _Attention:
    entry: fx.Node
    nodes: list[fx.Node]
    out: fx.Node


def _is_core(node: fx.Node) -> bool:
    if node.target is aten.scaled_dot_product_attention.default:
        return True
    return node.target is aten.softmax.int and any(_reaches_product(user) for user in node.users)


def _reaches_product(node: fx.Node) -> bool:
    """Whether a probability is multiplied with values, through dropout, casts and reshapes."""
    while node.op == "call_function" and node.target not in PRODUCTS and len(node.users) == 1:
        if node.target is aten.linear.default:
            return False
        node = next(iter(node.users))
    return node.target in PRODUCTS


def _read(graph: fx.Graph, core: fx.Node) -> _Attention | str:
    out = _output_product(core)
    if isinstance(out, str):
        return out
    says = token_dependent(graph)
    order = {node: i for i, node in enumerate(graph.nodes)}
    members, entries = {out}, set[fx.Node]()
    _collect(out.args[0], says, members, entries)
    for _ in range(len(order)):
        if len(entries) == 1:
            return _closed(entries.pop(), members, out, order)
        latest = max(entries, key=order.__getitem__, default=None)
        if latest is None or latest.op != "call_function":
            return "its inputs do not come from one value"
        entries.discard(latest)
        _collect(latest, says, members, entries)
    return "its inputs do not come from one value"


def _output_product(core: fx.Node) -> fx.Node | str:
    """The first product with a weight downstream of the core."""
    node = core
    while node.target is not aten.linear.default or node is core:
        following = [user for user in node.users if user.target not in READS_SHAPE_ONLY]
        if not following or following[0].op != "call_function":
            return "no output projection follows it"
        node = following[0]
    return node


def _collect(start: Any, says: set[fx.Node], members: set[fx.Node], entries: set[fx.Node]) -> None:
    """Add what `start` is computed from, back to the inputs of projections, which become `entries`."""
    stack = [start]
    while stack:
        node = stack.pop()
        if not isinstance(node, fx.Node) or node not in says or node in members:
            continue
        if node.op != "call_function":
            entries.add(node)
            continue
        members.add(node)
        entries.discard(node)
        if node.target is aten.linear.default:
            first = node.args[0]
            if isinstance(first, fx.Node) and first not in members:
                entries.add(first)
        else:
            stack.extend(node.all_input_nodes)


def _closed(
    entry: fx.Node, members: set[fx.Node], out: fx.Node, order: dict[fx.Node, int]
) -> _Attention | str:
    for node in members - {out}:
        for user in node.users:
            if user not in members and user.target not in READS_SHAPE_ONLY:
                return f"`{node.name}` inside it is also used by `{user.name}`"
    return _Attention(entry, sorted(members, key=order.__getitem__), out)


def _outline(program: Program, found: _Attention, index: int) -> None:
    root = program.graph
    weights = parameter_only(root.graph)
    targets = tensors_read(root, found.nodes, weights)
    public = {target: program.origins.public_name(target) for target in targets}
    relative = relative_names(public.values())
    path = common_path(str(node.meta["path"]) for node in found.nodes if node.meta.get("path"))
    region = Region(kind="attention", index=index, path=path, source=_source(found.nodes))
    program.ledger = program.ledger.update(
        public.values(),
        role=region.name,
        status="kept",
        reason="part of an attention",
        by="outline_attention",
    )
    others = [n for n in external_inputs(found.nodes, weights) if n is not found.entry]
    inputs = [(found.entry, "x"), *((node, _input_name(node, i)) for i, node in enumerate(others))]
    _, program.origins = outline(
        root, program.origins, found.nodes, region,
        inputs=inputs, outputs=[found.out], name_weight=lambda target: relative[public[target]],
    )  # fmt: skip


def _input_name(node: fx.Node, position: int) -> str:
    value = node.meta.get("val")
    return node.name if isinstance(value, torch.Tensor) else f"size_{position}"


def _source(nodes: Sequence[fx.Node]) -> str:
    return next((str(n.meta["source"]) for n in nodes if n.meta.get("source")), "")


def _name_the_head(program: Program) -> None:
    """The products whose result is the logits get their role in the ledger."""
    for entry in program.ledger:
        if "language-model head" in entry.reason:
            program.ledger = program.ledger.update(
                [entry.weight], role="head", reason="the language-model head"
            )
