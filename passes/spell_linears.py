"""Spell every product with a weight matrix as `linear(x, weight, bias)`.

before:  reshape(addmm(bias, flatten(x, 0, -2), w), [B, S, F])
after:   linear(x, t(w), bias)

before:  x @ w.T + bias;        einsum("bsd,df->bsf", x, w)
after:   linear(x, w, bias);    linear(x, t(w))

Assumes: `normalize_views` ran. A matrix stored as [in, out] is read through `t`, its only spelling of
transposition.
Contract: exact (the same products, possibly summed in another order).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moec.ir import Pass, Program
from moec.ir.graphs import drop_unused, weight_of
from moec.ir.patterns import argument, call, for_each, is_call, only_user, replace, same_shape, tensor

aten = torch.ops.aten
RESHAPES = {aten.reshape.default, aten.view.default, aten.unflatten.int}


@dataclass(frozen=True)
class SpellLinears(Pass):
    """See the module."""

    def apply(self, program: Program) -> Program:
        root, graph = program.graph, program.graph.graph
        for rule in (_transposed_weight, _addmm, _matmul, _einsum, _lift_reshape, _bias):
            for_each(graph, lambda node, rule=rule: rule(root, node))  # type: ignore[misc]
        drop_unused(root)
        return program


def _is_matrix(root: fx.GraphModule, value: Any) -> bool:
    """Whether `value` is a 2-D weight, read as it is or through `t`."""
    if is_call(value, aten.t.default):
        value = value.args[0]
    weight = weight_of(root, value) if isinstance(value, fx.Node) else None
    return weight is not None and weight.dim() == 2


def _transposed_weight(root: fx.GraphModule, node: fx.Node) -> None:
    """Every transposition of a weight matrix becomes `t`; `t(t(w))` becomes `w`."""
    source = node.args[0] if node.args else None
    if not _is_matrix(root, source) or not _swaps(node):
        return
    assert isinstance(source, fx.Node)
    if is_call(source, aten.t.default):
        replace(node, source.args[0])  # type: ignore[arg-type]
    elif node.target is not aten.t.default:
        replace(node, call(node, aten.t.default, (source,)))


def _swaps(node: fx.Node) -> bool:
    if node.target in (aten.t.default, aten.numpy_T.default, aten.mT.default):
        return True
    if node.target is aten.transpose.int:
        swapped: list[Any] = list(node.args[1:3])
        return {dim % 2 for dim in swapped} == {0, 1}
    order: Any = node.args[1] if node.target is aten.permute.default else ()
    return [dim % 2 for dim in order] == [1, 0]


def _linear(before: fx.Node, x: Any, matrix: fx.Node, bias: Any = None) -> fx.Node:
    """`linear` for `x @ matrix`, whose weight is the transpose of `matrix`."""
    flipped = matrix.args[0] if is_call(matrix, aten.t.default) else call(before, aten.t.default, (matrix,))
    return call(before, aten.linear.default, (x, flipped) if bias is None else (x, flipped, bias))


def _addmm(root: fx.GraphModule, node: fx.Node) -> None:
    plain = node.kwargs.get("beta", 1) == 1 and node.kwargs.get("alpha", 1) == 1
    if node.target is not aten.addmm.default or not plain or not _is_matrix(root, node.args[2]):
        return
    bias = tensor(node.args[0])
    if bias is not None and bias.dim() == 1:
        replace(node, _linear(node, node.args[1], node.args[2], node.args[0]))  # type: ignore[arg-type]


def _matmul(root: fx.GraphModule, node: fx.Node) -> None:
    if node.target not in (aten.matmul.default, aten.mm.default) or not _is_matrix(root, node.args[1]):
        return
    left = tensor(node.args[0])
    if left is not None and left.dim() >= 2:
        replace(node, _linear(node, node.args[0], node.args[1]))  # type: ignore[arg-type]


def _einsum(root: fx.GraphModule, node: fx.Node) -> None:
    """`einsum` that contracts the last dim of a value with one dim of a weight matrix."""
    if node.target is not aten.einsum.default or len(node.args[1]) != 2:  # type: ignore[arg-type]
        return
    operands: Any = node.args[1]
    x, weight = operands
    inputs, _, result = str(node.args[0]).replace(" ", "").partition("->")
    left, right = inputs.split(",")
    if not _is_matrix(root, weight) or len(right) != 2 or left[-1] not in right or not result:
        return
    out = right.replace(left[-1], "", 1)
    if result != left[:-1] + out or out in left:
        return
    matrix = weight if right[0] == left[-1] else call(node, aten.t.default, (weight,))
    replace(node, _linear(node, x, matrix))


def _lift_reshape(root: fx.GraphModule, node: fx.Node) -> None:
    """`reshape(linear(flatten(x, 0, -2), w, b), [*x.shape[:-1], out])` → `linear(x, w, b)`."""
    if node.target not in RESHAPES or not is_call(node.args[0], aten.linear.default):
        return
    inner = node.args[0]
    assert isinstance(inner, fx.Node)
    flat = inner.args[0]
    if not is_call(flat, aten.flatten.using_ints, aten.reshape.default, aten.view.default):
        return
    x, after = tensor(flat.args[0]), tensor(node)  # type: ignore[union-attr]
    width = tensor(inner)
    if x is None or after is None or width is None or x.shape[-1] != tensor(flat).shape[-1]:  # type: ignore[union-attr]
        return
    if same_shape([*x.shape[:-1], width.shape[-1]], after.shape):
        replace(node, call(node, aten.linear.default, (flat.args[0], *inner.args[1:])))  # type: ignore[union-attr]


def _bias(root: fx.GraphModule, node: fx.Node) -> None:
    """`linear(x, w) + bias` → `linear(x, w, bias)`, when the product is used for nothing else."""
    if node.target is not aten.add.Tensor or node.kwargs.get("alpha", 1) != 1:
        return
    for product, bias in (node.args[:2], node.args[1::-1]):
        if not is_call(product, aten.linear.default) or only_user(product) is not node:  # type: ignore[arg-type]
            continue
        value = weight_of(root, bias) if isinstance(bias, fx.Node) else None
        has_bias = argument(product, 2, "bias") is not None  # type: ignore[arg-type]
        if value is not None and not has_bias and list(value.shape) == [tensor(product).shape[-1]]:  # type: ignore[union-attr]
            replace(node, call(node, aten.linear.default, (*product.args[:2], bias)))  # type: ignore[union-attr]
            return
