"""Spell every product of two values as `matmul` over the leading dims both have.

before:  einsum("bhqd,bhkd->bhqk", q, k);   baddbmm(bias, q, k, beta=1.0, alpha=0.125);   bmm(p, v)
after:   matmul(q, transpose(k, -2, -1));   matmul(q, k) * 0.125 + bias;                  matmul(p, v)

before:  unflatten(bmm(flatten(p, 0, 1), flatten(v, 0, 1)), 0, [-1, 12])
after:   matmul(p, v)

Assumes: `spell_linears` ran: products with weights are `linear`. An einsum that sums or repeats a letter of
one operand alone stays as it is.
Contract: exact (the same products, possibly summed in another order).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moec.ir import Pass, Program
from moec.ir.dependence import token_dependent
from moec.ir.graphs import drop_unused
from moec.ir.patterns import call, for_each, is_call, replace, tensor

aten = torch.ops.aten

POINTWISE = {
    aten.add.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.where.self,
    aten.to.dtype,
    aten.neg.default,
}


@dataclass(frozen=True)
class SpellProducts(Pass):
    """See the module."""

    def apply(self, program: Program) -> Program:
        graph = program.graph.graph
        for_each(graph, _einsum)
        for_each(graph, _batched)
        says = token_dependent(graph)
        for_each(graph, lambda node: _lift(node, says))
        drop_unused(program.graph)
        return program


def _batched(node: fx.Node) -> None:
    """`bmm` and `baddbmm`, which want exactly three dims, as `matmul` and a sum."""
    if is_call(node, aten.bmm.default):
        replace(node, call(node, aten.matmul.default, tuple(node.args[:2])))
    elif is_call(node, aten.baddbmm.default):
        product = call(node, aten.matmul.default, tuple(node.args[1:3]))
        scaled = _scaled(node, product, node.kwargs.get("alpha", 1))
        if node.kwargs.get("beta", 1) == 0:
            replace(node, scaled)
            return
        added = _scaled(node, node.args[0], node.kwargs.get("beta", 1))
        replace(node, call(node, aten.add.Tensor, (scaled, added)))


def _scaled(before: fx.Node, value: Any, factor: Any) -> fx.Node:
    return value if factor == 1 else call(before, aten.mul.Tensor, (value, factor))


# einsum


def _einsum(node: fx.Node) -> None:
    """An einsum of two values with shared leading letters, one free letter each and one summed letter."""
    operands: Any = node.args[1] if is_call(node, aten.einsum.default) else ()
    if len(operands) != 2:
        return
    left, right = operands
    letters = _letters(str(node.args[0]))
    if letters is None or any(tensor(value) is None for value in (left, right)):
        return
    batch, rows, inner, columns, (first, second, result) = letters
    a = _laid_out(node, left, first, batch + rows + inner)
    b = _laid_out(node, right, second, batch + inner + columns)
    made = call(node, aten.matmul.default, (a, b))
    replace(node, _laid_out(node, made, batch + rows + columns, result))


def _letters(equation: str) -> tuple[str, str, str, str, tuple[str, str, str]] | None:
    """(batch, rows, inner, columns) of `batch rows inner, batch inner columns -> batch rows columns`."""
    inputs, _, result = equation.replace(" ", "").partition("->")
    first, _, second = inputs.partition(",")
    if "." in equation or any(len(set(word)) != len(word) for word in (first, second, result)):
        return None
    batch = "".join(c for c in result if c in first and c in second)
    rows, columns = ("".join(c for c in result if c in word and c not in batch) for word in (first, second))
    inner = "".join(c for c in first if c in second and c not in result)
    whole = set(batch + rows + inner), set(batch + inner + columns), set(batch + rows + columns)
    if whole != (set(first), set(second), set(result)) or (len(rows), len(inner), len(columns)) != (1, 1, 1):
        return None
    return batch, rows, inner, columns, (first, second, result)


def _laid_out(before: fx.Node, value: fx.Node, letters: str, wanted: str) -> fx.Node:
    """`value`, whose dims are `letters`, with its dims in the order `wanted`."""
    order = [letters.index(letter) for letter in wanted]
    moved = [i for i, d in enumerate(order) if i != d]
    if not moved:
        return value
    if len(moved) == 2:
        rank = len(order)
        dims = tuple(d - rank if d >= rank - 2 and min(moved) >= rank - 2 else d for d in moved)
        return call(before, aten.transpose.int, (value, *dims))
    return call(before, aten.permute.default, (value, order))


# leading dims merged for bmm's sake


def _lift(node: fx.Node, says: set[fx.Node]) -> None:
    """Do without merging batch and heads, where everything between was merged only to be split again."""
    if not is_call(node, aten.unflatten.int) or node.args[1] != 0 or node not in says:
        return
    sizes = list(node.args[2])  # type: ignore[arg-type]
    if (
        len(sizes) == 2
        and not is_call(node.args[0], aten.flatten.using_ints)
        and _can_lift(node.args[0], sizes, says)
    ):
        replace(node, _lifted(node, node.args[0], sizes, says))


def _can_lift(value: Any, sizes: list[Any], says: set[fx.Node]) -> bool:
    """Whether `value` is made of products and pointwise steps over values merged from leading dims
    `sizes`."""
    if not isinstance(value, fx.Node) or tensor(value) is None:
        return not isinstance(value, fx.Node)
    if _is_merged(value, sizes):
        return True
    if value not in says:
        return tensor(value).dim() == 3  # type: ignore[union-attr]
    if is_call(value, aten.transpose.int):
        return {int(d) % 3 for d in value.args[1:3]} == {1, 2} and _can_lift(value.args[0], sizes, says)  # type: ignore[arg-type]
    if is_call(value, aten.matmul.default, *POINTWISE):
        return all(_can_lift(a, sizes, says) for a in value.args if isinstance(a, fx.Node))
    return False


def _is_merged(value: fx.Node, sizes: list[Any]) -> bool:
    """Whether `value` merges leading dims, the inner of which has the size that `sizes` splits off."""
    if not is_call(value, aten.flatten.using_ints) or tuple(value.args[1:3]) != (0, 1):
        return False
    before = tensor(value.args[0])
    return before is not None and before.dim() == 4 and str(before.shape[1]) == str(sizes[1])


def _lifted(before: fx.Node, value: Any, sizes: list[Any], says: set[fx.Node]) -> Any:
    if not isinstance(value, fx.Node):
        return value
    if _is_merged(value, sizes):
        return value.args[0]
    if value not in says:
        return call(before, aten.unflatten.int, (value, 0, sizes))
    if is_call(value, aten.transpose.int):
        return call(before, aten.transpose.int, (_lifted(before, value.args[0], sizes, says), -2, -1))
    args = tuple(_lifted(before, a, sizes, says) for a in value.args)
    return call(before, value.target, args, dict(value.kwargs))
