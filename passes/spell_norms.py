"""Spell normalisation written by hand as `rms_norm(x, [D], weight, eps)` or `layer_norm(x, [D], weight,
bias, eps)`.

before:  y = x * rsqrt(mean(x ** 2, -1, keepdim) + eps);   z = weight * to(y, dtype)
after:   z = rms_norm(x, [D], weight, eps)

before:  c = x - mean(x, -1, keepdim);   y = c * rsqrt(mean(c ** 2, -1, keepdim) + eps)
after:   y = layer_norm(x, [D], None, None, eps)

Assumes: the mean runs over the last dim alone. `rms_norm` computes in fp32 for narrower dtypes, as the
spelling with casts does.
Contract: exact.
Source:  Zhang and Sennrich, arXiv 1910.07467, eq. 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moec.ir import Pass, Program
from moec.ir.dependence import token_dependent
from moec.ir.graphs import drop_unused
from moec.ir.patterns import argument, call, for_each, inputs, is_call, only_user, replace, tensor, uncast

aten = torch.ops.aten
NORMS = (aten.rms_norm.default, aten.layer_norm.default)


@dataclass(frozen=True)
class SpellNorms(Pass):
    """See the module."""

    def apply(self, program: Program) -> Program:
        graph = program.graph.graph
        for_each(graph, _normalise)
        for_each(graph, _centre)
        for_each(graph, _cast)
        says = token_dependent(graph)
        for_each(graph, lambda node: _weigh(node, says))
        drop_unused(program.graph)
        return program


def _normalise(node: fx.Node) -> None:
    """`x * rsqrt(mean(x²) + eps)`, or `x / sqrt(…)`, → `rms_norm(x, [D], None, eps)`."""
    for x, scale in _operands(node):
        found = _mean_square(scale)
        if found is not None and _same_value(found[0], x):
            width = tensor(x).shape[-1]  # type: ignore[union-attr]
            replace(node, call(node, aten.rms_norm.default, (x, [width], None, found[1])))
            return


def _same_value(a: Any, b: Any) -> bool:
    """Whether two arguments are one value, or the same operator on the same values (written twice)."""
    if a is b or not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return a is b or (not isinstance(a, fx.Node) and bool(a == b))
    alike = a.op == b.op == "call_function" and a.target is b.target and a.kwargs == b.kwargs
    random = torch.Tag.nondeterministic_seeded in getattr(a.target, "tags", ())
    return alike and not random and len(a.args) == len(b.args) and all(map(_same_value, a.args, b.args))


def _centre(node: fx.Node) -> None:
    """`rms_norm(x - mean(x))` → `layer_norm(x)`."""
    if not is_call(node, aten.rms_norm.default) or not is_call(node.args[0], aten.sub.Tensor):
        return
    x, mean = inputs(node.args[0])
    value = tensor(x)
    if value is None or not is_call(mean, aten.mean.dim) or mean.args[0] is not x:
        return
    last = [int(d) % value.dim() for d in mean.args[1]] == [value.dim() - 1]
    if last and argument(mean, 2, "keepdim", False) is True:
        replace(node, call(node, aten.layer_norm.default, (x, node.args[1], None, None, node.args[3])))


def _operands(node: fx.Node) -> list[tuple[Any, Any]]:
    """(x, 1/rms) pairs to try: both orders of a product, `x / sqrt(v)` through its denominator."""
    if is_call(node, aten.mul.Tensor):
        a, b = inputs(node)
        return [(x, s.args[0]) for x, s in ((a, b), (b, a)) if _is_reciprocal_root(s)]
    if is_call(node, aten.div.Tensor) and is_call(node.args[1], aten.sqrt.default):
        x, root = inputs(node)
        return [(x, root.args[0])]
    return []


def _is_reciprocal_root(value: Any) -> bool:
    return is_call(value, aten.rsqrt.default) or (
        is_call(value, aten.pow.Tensor_Scalar) and value.args[1] == -0.5
    )


def _mean_square(value: Any) -> tuple[fx.Node, float] | None:
    """(x, eps) when `value` is `mean(x², -1, keepdim=True) + eps`."""
    if not is_call(value, aten.add.Tensor) or not isinstance(value.args[1], (int, float)):
        return None
    mean, eps = value.args[0], float(value.args[1])
    if not is_call(mean, aten.mean.dim) or argument(mean, 2, "keepdim", False) is not True:
        return None
    square, dims = mean.args[0], [int(d) for d in mean.args[1]]
    shape = tensor(square).shape  # type: ignore[union-attr]
    x = _squared(square)
    return (x, eps) if x is not None and dims in ([-1], [len(shape) - 1]) else None


def _squared(value: Any) -> fx.Node | None:
    if is_call(value, aten.pow.Tensor_Scalar) and value.args[1] == 2:
        return value.args[0]
    if is_call(value, aten.square.default):
        return value.args[0]
    return value.args[0] if is_call(value, aten.mul.Tensor) and value.args[0] is value.args[1] else None


def _cast(node: fx.Node) -> None:
    """`to(rms_norm(to(x, float32)), x.dtype)` → `rms_norm(x)`: the operator widens by itself."""
    if not is_call(node, aten.to.dtype) or not is_call(node.args[0], *NORMS):
        return
    norm: Any = node.args[0]
    x = uncast(norm.args[0])
    before, after = tensor(x), tensor(node)
    narrow = before is not None and after is not None and before.dtype == after.dtype
    if x is not norm.args[0] and narrow and only_user(norm) is node:
        replace(node, call(node, norm.target, (x, *norm.args[1:])))


def _weigh(node: fx.Node, says: set[fx.Node]) -> None:
    """`weight * norm(x)` → `norm(x, weight)`; the weight may be any [D] expression of parameters."""
    if not is_call(node, aten.mul.Tensor):
        return
    first, second = inputs(node)
    for norm, weight in ((first, second), (second, first)):
        if not is_call(norm, *NORMS) or norm.args[2] is not None or only_user(norm) is not node:
            continue
        value, shape = tensor(weight), list(norm.args[1])
        if weight not in says and value is not None and list(value.shape) == shape:
            replace(node, call(node, norm.target, (norm.args[0], shape, weight, *norm.args[3:])))
            return
