"""What a value that depends on positions is called: `mask`, `cos`, `sin`, `p`, `bias`.

It is named after what it comes from: the operator behind it, whether it is boolean, and which of its dims are
sequences. Nobody's variable names are looked at.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from moec.ir import region_of
from moec.ir.graphs import output

aten = torch.ops.aten

# Operators that keep what a value is: views, casts, scaling.
CARRIERS = {
    aten.unsqueeze.default, aten.unflatten.int, aten.flatten.using_ints, aten.expand.default, aten.to.dtype,
    aten.transpose.int, aten.slice.Tensor, aten.reshape.default, aten.mul.Tensor, aten.squeeze.dim,
    aten.cat.default,
    aten.stack.default, aten.repeat_interleave.self_int, aten.permute.default, aten.detach.default,
    aten.index.Tensor, aten.select.int, aten.div.Tensor,
}  # fmt: skip
TABLES = {
    aten.cos.default: "cos", aten.sin.default: "sin", aten.embedding.default: "p", aten.polar.default:
    "rotation",
}  # fmt: skip


def position_word(root: fx.GraphModule, node: fx.Node) -> str | None:
    """The word for a value of `root` that positions alone decide; None for anything else."""
    source = _inside_region(root, node)
    value = node.meta.get("val")
    if source is None or not isinstance(value, Tensor):
        return None
    return _table(source) or _by_shape(source, value)


def _inside_region(root: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The node of the region `positions` that `node` is the result of."""
    item = node.target is operator.getitem
    call = node.args[0] if item else node
    if not isinstance(call, fx.Node) or call.op != "call_module":
        return None
    module = root.get_submodule(str(call.target))
    region = region_of(module)
    if region is None or region.kind != "positions" or not isinstance(module, fx.GraphModule):
        return None
    result: Any = output(module.graph).args[0]
    found = result[node.args[1]] if item else result
    return found if isinstance(found, fx.Node) else None


def _table(source: fx.Node) -> str | None:
    """The table a value was taken from: the one kind of table behind it, past views, casts and scaling."""
    found, stack, seen = set[str](), [source], set[fx.Node]()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target in TABLES:
            found.add(TABLES[node.target])
        elif node.op == "get_attr":
            found.add("p")
        elif node.target in CARRIERS:
            stack.extend(n for n in _carried(node))
    if found == {"cos", "sin"}:
        return "rotation"
    return found.pop() if len(found) == 1 else None


def _carried(node: fx.Node) -> list[fx.Node]:
    """The inputs whose values `node` passes on: not those it looks up by."""
    if node.target in (aten.cat.default, aten.stack.default):
        return [n for n in node.args[0] if isinstance(n, fx.Node)]  # type: ignore[union-attr]
    return [node.args[0]] if isinstance(node.args[0], fx.Node) else []


def _by_shape(source: fx.Node, value: Tensor) -> str | None:
    sequences = [i for i, size in enumerate(value.shape) if not isinstance(size, int)]
    if value.dtype is torch.bool or _is_square(value):
        return "mask" if value.dtype is torch.bool or _comes_from_a_mask(source) else "bias"
    if value.is_floating_point() and value.dim() - 1 in sequences:
        return "bias"
    word = "p" if value.is_floating_point() else "i"
    return word if value.dim() else "c"


def _is_square(value: Tensor) -> bool:
    """Whether a value has one entry for every pair of positions."""
    if value.dim() < 2 or isinstance(value.shape[-1], int):
        return False
    return value.is_floating_point() and str(value.shape[-1]) == str(value.shape[-2])


def _comes_from_a_mask(source: fx.Node) -> bool:
    """Whether something boolean, or a triangle, decided it."""
    stack, seen = [source], set[fx.Node]()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        value = node.meta.get("val")
        triangle = node.target in (aten.triu.default, aten.tril.default)
        if triangle or (isinstance(value, Tensor) and value.dtype is torch.bool):
            return True
        stack.extend(node.all_input_nodes)
    return False
