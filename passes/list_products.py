"""The ledger's rows: every product with a weight, in program order, before anything is decided about it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from moec.ir import Entry, Ledger, Program
from moec.ir.graphs import weight_of

aten = torch.ops.aten
PRODUCTS = {
    aten.linear.default: 1, aten.matmul.default: 1, aten.mm.default: 1, aten.bmm.default: 1, aten.addmm.default: 2,
    aten.einsum.default: 1, aten.conv1d.default: 1, aten.convolution.default: 1,
}  # fmt: skip


def list_products(program: Program) -> Ledger:
    """One entry per parameterised matrix product of the root graph; status *kept* until a pass says otherwise."""
    entries, seen = [], set[str]()
    for node in program.graph.graph.nodes:
        for target, value in _weights(program.graph, node):
            name = program.origins.public_name(target)
            if name in seen:
                continue
            seen.add(name)
            shape = tuple(reversed(value.shape)) if _is_turned(node) else tuple(value.shape)
            entries.append(Entry(name, shape, "", "kept", "not a feed-forward", source=node.meta.get("source", "")))
    return Ledger(entries, program.source.notes)


def _weights(root: fx.GraphModule, node: fx.Node) -> list[tuple[str, Tensor]]:
    """The weights a product multiplies by: of a known product its matrix, of any other operator 3-D weights."""
    if node.op != "call_function" or node.target is aten.embedding.default:
        return []
    found = []
    operands = _operands(node) if node.target in PRODUCTS else node.all_input_nodes
    for value in operands:
        source = _through_views(value)
        weight = weight_of(root, source) if source is not None else None
        least = 2 if node.target in PRODUCTS else 3
        if weight is not None and weight.dim() >= least and isinstance(weight, torch.nn.Parameter):
            found.append((str(source.target), weight))  # type: ignore[union-attr]
    return found


def _operands(node: fx.Node) -> list[Any]:
    if node.target is aten.einsum.default:
        return list(node.args[1])  # type: ignore[arg-type]
    position = PRODUCTS[node.target]  # type: ignore[index]
    return [node.args[position]] if len(node.args) > position else []


def _through_views(value: Any) -> fx.Node | None:
    views = (aten.t.default, aten.transpose.int, aten.permute.default, aten.select.int, aten.to.dtype)
    while isinstance(value, fx.Node) and value.op == "call_function" and value.target in views:
        value = value.args[0]
    return value if isinstance(value, fx.Node) and value.op == "get_attr" else None


def _is_turned(node: fx.Node) -> bool:
    matrix = node.args[1] if node.target is aten.linear.default else None
    return isinstance(matrix, fx.Node) and matrix.target is aten.t.default
