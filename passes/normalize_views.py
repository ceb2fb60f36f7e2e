"""Spell every change of shape without batch or sequence sizes, and count feature dims from the end.

before:  view(x, [B, S, 12, 64]);   view(y, [B, S, 768]);   expand(k, [B, 2, 3, S, 8]);   split(x, 64, 2)
after:   unflatten(x, -1, [12, 64]); flatten(y, -2, -1);     expand(k, [-1, -1, 3, -1, -1]); split(x, 64, -1)

before:  permute(o, [0, 2, 1, 3]);       transpose(k, 3, 2)
after:   transpose(o, 1, 2);             transpose(k, -2, -1)

Assumes: `drop_noops` ran. A reshape that mixes several free sizes at once stays a reshape.
Contract: exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moec.ir import Pass, Program
from moec.ir.graphs import drop_unused, weight_of
from moec.ir.outline import CONSTANTS
from moec.ir.patterns import argument, call, for_each, replace, same_size, static, tensor

aten = torch.ops.aten

# Operators with one `dim` argument that names a feature dim: target → position of `dim`.
DIM_ARGUMENT = {
    aten.split.Tensor: 2, aten.split_with_sizes.default: 2, aten.chunk.default: 2, aten.cat.default: 1,
    aten.softmax.int: 1, aten.slice.Tensor: 1, aten.select.int: 1, aten.unbind.int: 1, aten.stack.default: 1,
    aten.unsqueeze.default: 1,
}  # fmt: skip
RESHAPES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}


@dataclass(frozen=True)
class NormalizeViews(Pass):
    """See the module."""

    def apply(self, program: Program) -> Program:
        for_each(program.graph.graph, _rewrite)
        for_each(program.graph.graph, lambda node: _lookup(program.graph, node))
        drop_unused(program.graph)
        return program


def _rewrite(node: fx.Node) -> None:
    if node.target in RESHAPES:
        _reshape(node)
    elif node.target is aten.expand.default:
        _expand(node)
    elif node.target is aten.permute.default:
        _permute(node)
    elif node.target is aten.transpose.int:
        _transpose(node)
    elif node.target in DIM_ARGUMENT:
        _count_from_the_end(node)
    elif node.target in (aten.unflatten.int, aten.flatten.using_ints):
        _reshape(node)


def _reshape(node: fx.Node) -> None:
    before, after = tensor(node.args[0]), tensor(node)
    if before is None or after is None:
        return
    plan = split_and_merge(list(before.shape), list(after.shape))
    value: Any = node.args[0]
    if plan is None:
        if node.target in RESHAPES and node.target is not aten.reshape.default:
            replace(node, call(node, aten.reshape.default, tuple(node.args[:2])))
        return
    for target, *arguments in plan:
        value = call(node, target, (value, *arguments))
    replace(node, value)


def split_and_merge(before: list[Any], after: list[Any]) -> list[tuple[Any, ...]] | None:
    """The change of shape as at most one flatten and one unflatten of the dims that differ, or None.

    >>> split_and_merge([4, 6], [4, 2, 3])
    [(<OpOverload(op='aten.unflatten', overload='int')>, -1, [2, 3])]
    """
    head = _common(before, after)
    tail = _common(before[head:][::-1], after[head:][::-1])
    old, new = before[head : len(before) - tail], after[head : len(after) - tail]
    if not old or not new or sum(not static([size]) for size in new) > 1:
        return None
    steps: list[tuple[Any, ...]] = []
    if len(old) > 1:
        steps.append((aten.flatten.using_ints, *_dims(head, len(old), tail, len(before))))
    if len(new) > 1:
        sizes = [int(size) if static([size]) else -1 for size in new]
        steps.append((aten.unflatten.int, -1 - tail if tail == 0 or head else head, sizes))
    return steps


def _dims(head: int, count: int, tail: int, rank: int) -> tuple[int, int]:
    """First and last dim to merge, counted from the end unless the very first dim is among them."""
    return (0, count - 1) if head == 0 else (head - rank, head + count - 1 - rank)


def _common(a: Sequence[Any], b: Sequence[Any]) -> int:
    count = 0
    for x, y in zip(a, b, strict=False):
        if not same_size(x, y):
            break
        count += 1
    return count


def _permute(node: fx.Node) -> None:
    """A permutation that only swaps two dims is a transposition."""
    order = [int(d) % len(node.args[1]) for d in node.args[1]]  # type: ignore[union-attr,arg-type]
    moved = [i for i, d in enumerate(order) if i != d]
    if len(moved) == 2:
        swapped = call(node, aten.transpose.int, (node.args[0], *moved))
        replace(node, swapped)
        _transpose(swapped)


def _transpose(node: fx.Node) -> None:
    """Dims in ascending order; two that are neither batch nor sequence are counted from the end."""
    value = tensor(node.args[0])
    if value is None:
        return
    dims: list[Any] = list(node.args[1:3])
    first, second = sorted(dim % value.dim() for dim in dims)
    rank = value.dim() if first >= 2 else 0
    node.args = (node.args[0], first - rank, second - rank)


def _expand(node: fx.Node) -> None:
    """Sizes that do not change are written -1."""
    before, after = tensor(node.args[0]), tensor(node)
    if before is None or after is None:
        return
    new = len(after.shape) - len(before.shape)
    sizes = list(node.args[1])  # type: ignore[arg-type]
    for i, size in enumerate(after.shape[new:]):
        if same_size(before.shape[i], size):
            sizes[new + i] = -1
    node.update_arg(1, sizes)


def _lookup(root: fx.GraphModule, node: fx.Node) -> None:
    """`x[..., [4, 5]]` with a constant list of neighbours is a slice."""
    if node.target is not aten.index.Tensor:
        return
    value, lists = tensor(node.args[0]), [i for i in enumerate(node.args[1]) if i[1] is not None]  # type: ignore[arg-type]
    run = _neighbours(root, lists[0][1]) if len(lists) == 1 else None
    if value is None or run is None:
        return
    dim = lists[0][0] - (value.dim() if lists[0][0] >= 2 else 0)
    size = value.shape[dim]
    if isinstance(size, int):
        start = run[0] % size
        replace(node, call(node, aten.slice.Tensor, (node.args[0], dim, start, start + len(run))))


def _neighbours(root: fx.GraphModule, node: Any) -> list[int] | None:
    """The numbers of a constant list of neighbours, counted all from the start or all from the end."""
    value = weight_of(root, node) if isinstance(node, fx.Node) else None
    known = value is not None and str(node.target).startswith(CONSTANTS) and not value.is_meta
    if not known or value.dim() != 1 or value.dtype is torch.bool:  # type: ignore[union-attr]
        return None
    run = [int(i) for i in value.tolist()]  # type: ignore[union-attr]
    one_side = bool(run) and (run[0] >= 0 or run[-1] < 0)
    return run if one_side and run == list(range(run[0], run[0] + len(run))) else None


def _count_from_the_end(node: fx.Node) -> None:
    """A dim that is not the batch or sequence of its input is counted from the end."""
    position = DIM_ARGUMENT[node.target]  # type: ignore[index]
    dim = argument(node, position, "dim", 0)
    first = node.args[0][0] if isinstance(node.args[0], (list, tuple)) else node.args[0]
    value = tensor(first)
    if value is None or not isinstance(dim, int) or dim < 2:
        return
    rank = value.dim() + (node.target in (aten.stack.default, aten.unsqueeze.default))
    if "dim" in node.kwargs:
        node.update_kwarg("dim", dim - rank)
    else:
        node.update_arg(position, dim - rank)
