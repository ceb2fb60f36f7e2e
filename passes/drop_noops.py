"""Drop what computes nothing: assertions, casts to the same dtype, copies, full slices, dropout of nothing.

before:  a = to(x, float32);  b = slice(a, 0, 0, end);  c = dropout(b, 0.0);  y = f(c)
after:   y = f(x)

Assumes: no operator writes in place. Casts are no-ops *in the dtype of the capture*; capture in the plan's
dtype.
Contract: exact.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from moec.ir import Pass, Program
from moec.ir.graphs import drop_unused, weight_of
from moec.ir.patterns import argument, call, for_each, is_call, replace, same_shape, tensor

aten = torch.ops.aten

ASSERTIONS = {
    aten._assert_async.msg, aten._assert_async.default, aten._assert_scalar.default,
    aten._assert_tensor_metadata.default, aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}  # fmt: skip
COPIES = {aten.alias.default, aten.lift_fresh_copy.default, aten.contiguous.default, aten.clone.default}
ANY_CAST = {
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default,
    aten._to_copy.default,
}  # fmt: skip
SHAPED = {
    aten.view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.view_as.default,
    aten.expand_as.default,
}


@dataclass(frozen=True)
class DropNoops(Pass):
    """See the module."""

    def apply(self, program: Program) -> Program:
        graph = program.graph.graph
        learned = _reads_parameters(program.graph)
        for node in [n for n in graph.nodes if n.target in ASSERTIONS or is_guard(n)]:
            graph.erase_node(node)
        for_each(graph, _relax_view)
        for_each(graph, _drop_idle_arguments)
        for_each(graph, lambda node: _drop(node, learned))
        drop_unused(program.graph)
        return program


def _relax_view(node: fx.Node) -> None:
    """Without copies a view may meet a layout it cannot view; `reshape` is the same function on any
    layout."""
    if node.target in (aten.view.default, aten._unsafe_view.default):
        node.target = aten.reshape.default


def _drop_idle_arguments(node: fx.Node) -> None:
    """Arguments that say nothing about the result: memory pinning, cuDNN switches, plain strides."""
    idle = {"pin_memory": (False, None), "layout": (torch.strided, None), "cudnn_enable": (True, False)}
    kept = {name: value for name, value in node.kwargs.items() if value not in idle.get(name, ())}
    node.kwargs = kept
    if node.target is aten.layer_norm.default:
        node.args = node.args[:5]


def is_guard(node: fx.Node) -> bool:
    """A `_guards_fn` call that torch.export leaves behind."""
    return node.op == "call_module" and not node.users


def _drop(node: fx.Node, learned: set[fx.Node]) -> None:
    if node.target is operator.getitem and isinstance(node.args[0], (list, tuple)):
        replace(node, node.args[0][node.args[1]])  # type: ignore[index,arg-type]
    elif (node.target is aten.detach.default and node.args[0] not in learned) or any(
        noop(node) for noop in NOOPS
    ):
        replace(node, node.args[0])  # type: ignore[arg-type]
    elif node.target in ANY_CAST and node.target is not aten.to.dtype:
        _plain_cast(node)
    elif node.target is aten.where.self:
        _plain_choice(node)


def _is_copy(node: fx.Node) -> bool:
    return node.target in COPIES


def _is_cast_to_itself(node: fx.Node) -> bool:
    before, after = tensor(node.args[0]), tensor(node)
    if node.target not in ANY_CAST or before is None or after is None:
        return False
    return before.dtype == after.dtype and before.device == after.device


def _is_same_shape(node: fx.Node) -> bool:
    before, after = tensor(node.args[0]), tensor(node)
    return (
        node.target in SHAPED
        and before is not None
        and after is not None
        and same_shape(before.shape, after.shape)
    )


def _is_full_slice(node: fx.Node) -> bool:
    if node.target is not aten.slice.Tensor:
        return False
    start, end, step = (argument(node, i, n) for i, n in ((2, "start"), (3, "end"), (4, "step")))
    if any(isinstance(bound, fx.Node) for bound in (start, end, step)):
        return False
    return start in (None, 0) and (end is None or end == sys.maxsize) and step in (None, 1)


def _is_empty_dropout(node: fx.Node) -> bool:
    return node.target is aten.dropout.default and bool(node.args[1] == 0.0)


def _is_neutral(node: fx.Node) -> bool:
    """`x + 0`, `x - 0`, `x * 1`, `x / 1`, where that changes neither dtype nor shape."""
    neutral = {aten.add.Tensor: 0, aten.sub.Tensor: 0, aten.mul.Tensor: 1, aten.div.Tensor: 1}
    if node.target not in neutral or isinstance(node.args[1], (fx.Node, bool)):
        return False
    before, after = tensor(node.args[0]), tensor(node)
    same = before is not None and after is not None and before.dtype == after.dtype
    return same and bool(node.args[1] == neutral[node.target])


def _is_single_repeat(node: fx.Node) -> bool:
    before = tensor(node.args[0])
    if node.target is not aten.repeat.default or before is None:
        return False
    return list(node.args[1]) == [1] * before.dim()  # type: ignore[arg-type]


NOOPS: tuple[Callable[[fx.Node], bool], ...] = (
    _is_copy, _is_cast_to_itself, _is_same_shape, _is_full_slice, _is_empty_dropout, _is_neutral,
    _is_single_repeat,
)  # fmt: skip


def _plain_cast(node: fx.Node) -> None:
    """Every spelling of a cast that stays on its device becomes `to(x, dtype)`."""
    before, after = tensor(node.args[0]), tensor(node)
    if before is not None and after is not None and before.device == after.device:
        replace(node, call(node, aten.to.dtype, (node.args[0], after.dtype)))


def _plain_choice(node: fx.Node) -> None:
    """`where(c, x, full([], -inf))` → `where(c, x, -inf)`, where the number does not widen the result."""
    other, kept, after = node.args[2], tensor(node.args[1]), tensor(node)
    if not is_call(other, aten.full.default, aten.scalar_tensor.default) or kept is None or after is None:
        return
    assert isinstance(other, fx.Node)
    number = other.args[-1]
    plain = isinstance(number, (int, float)) and tensor(other).dim() == 0 and kept.is_floating_point()  # type: ignore[union-attr]
    if plain and kept.dtype == after.dtype:
        replace(node, call(node, aten.where.ScalarOther, (*node.args[:2], number)))


def _reads_parameters(root: fx.GraphModule) -> set[fx.Node]:
    """The nodes through which a gradient could reach a parameter."""
    found: set[fx.Node] = set()
    for node in root.graph.nodes:
        weight = weight_of(root, node)
        if (weight is not None and weight.requires_grad) or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found
