"""The ledger's rows: every product with a weight, in program order, before anything is decided about it."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from moec.ir import Entry, Ledger, Program
from moec.ir.dependence import READS_SHAPE_ONLY
from moec.ir.graphs import weight_of

from .feed_forward import VIEWS, is_pointwise

aten = torch.ops.aten
CONVOLUTIONS = {aten.conv1d.default, aten.convolution.default}
CHOICES = {aten.topk.default, aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argmax.default}
PRODUCTS = {
    aten.linear.default: 1, aten.matmul.default: 1, aten.mm.default: 1, aten.bmm.default: 1,
    aten.addmm.default: 2, aten.einsum.default: 1, aten.conv1d.default: 1, aten.convolution.default: 1,
}  # fmt: skip


def list_products(program: Program) -> Ledger:
    """One entry per parameterised matrix product of the root graph; status *kept* until a pass says
    otherwise."""
    entries, seen = [], set[str]()
    for node in program.graph.graph.nodes:
        for target, value in _weights(program.graph, node):
            name = program.origins.public_name(target)
            if name in seen:
                continue
            seen.add(name)
            entries.append(_entry(node, name, value))
    return Ledger(entries, dict.fromkeys([*program.source.notes, *program.ledger.notes]))


def _entry(node: fx.Node, name: str, value: Tensor) -> Entry:
    source = node.meta.get("source", "")
    if value.dim() > 2 and node.target not in CONVOLUTIONS:
        reason = (
            "already sparse: one matrix per expert in one weight"
            if _is_routed(node)
            else "one matrix per head"
        )
        status = "refused" if _is_routed(node) else "kept"
        return Entry(
            name, tuple(value.shape), "experts" if _is_routed(node) else "", status, reason, source=source
        )
    shape = tuple(reversed(value.shape)) if _is_turned(node) else tuple(value.shape)
    return Entry(name, shape, "", "kept", "not a feed-forward", source=source)


def _is_routed(node: fx.Node) -> bool:
    """Whether a choice among experts stands before this product: a top-k, a sort, an argmax."""
    stack, seen = list(node.all_input_nodes), set[fx.Node]()
    while stack:
        current = stack.pop()
        if current.target in CHOICES:
            return True
        if current not in seen:
            seen.add(current)
            stack.extend(current.all_input_nodes)
    return False


def _weights(root: fx.GraphModule, node: fx.Node) -> list[tuple[str, Tensor]]:
    """The weights a product multiplies by: of a known product its matrix, of an unknown operator 3-D
    weights."""
    if node.op != "call_function" or node.target is aten.embedding.default or _only_moves(node):
        return []
    found: list[tuple[str, Tensor]] = []
    operands = _operands(node) if node.target in PRODUCTS else node.all_input_nodes
    for value in operands:
        source = _through_views(value)
        weight = weight_of(root, source) if source is not None else None
        least = 2 if node.target in PRODUCTS else 3
        if weight is not None and weight.dim() >= least and isinstance(weight, torch.nn.Parameter):
            found.append((str(source.target), weight))  # type: ignore[union-attr]
    return found


def _only_moves(node: fx.Node) -> bool:
    """Whether a call is no product at all: it acts on each element by itself, or only moves or reads
    shapes."""
    return is_pointwise(node) or node.target in VIEWS or node.target in READS_SHAPE_ONLY


def _operands(node: fx.Node) -> list[Any]:
    if node.target is aten.einsum.default:
        return list(node.args[1])  # type: ignore[arg-type]
    position = PRODUCTS[node.target]  # type: ignore[index]
    return [node.args[position]] if len(node.args) > position else []


def _through_views(value: Any) -> fx.Node | None:
    views = (
        aten.t.default, aten.transpose.int, aten.permute.default, aten.select.int, aten.to.dtype,
        aten.unbind.int, aten.slice.Tensor, operator.getitem,
    )  # fmt: skip
    while isinstance(value, fx.Node) and value.op == "call_function" and value.target in views:
        value = value.args[0]
    return value if isinstance(value, fx.Node) and value.op == "get_attr" else None


def _is_turned(node: fx.Node) -> bool:
    matrix = node.args[1] if node.target is aten.linear.default else None
    return isinstance(matrix, fx.Node) and matrix.target is aten.t.default
