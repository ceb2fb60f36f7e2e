"""Spell activations that are written out by their names.

before:  0.5 * h * (1 + tanh(0.7978845608028654 * (h + 0.044715 * h ** 3)))     h * sigmoid(h)
after:   gelu(h, approximate="tanh")                                            silu(h)

A formula is recognised by what it computes, so the order in which it is written does not matter: pointwise
steps that start from one value are evaluated on a grid of numbers in fp64, and are rewritten when values and
slopes agree
with a known activation to rounding. A constant cut short (0.79788456, say) is another function and stays.

Assumes: stage *canonical* but for names; steps that are read elsewhere stay.
Contract: exact.
Source:  Hendrycks and Gimpel, arXiv 1606.08415; Elfwing, Uchibe and Doya, arXiv 1702.03118.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from moec.ir import Pass, Program
from moec.ir.graphs import drop_unused
from moec.ir.patterns import call, replace, tensor

aten = torch.ops.aten

# Evenly spaced numbers, 0 and far tails among them.
GRID = torch.cat(
    [torch.linspace(-12.0, 12.0, 961, dtype=torch.float64), torch.tensor([-60.0, 60.0]).double()]
)
TOLERANCE = 1e-13
LARGEST = 14

ACTIVATIONS: tuple[tuple[Any, dict[str, Any]], ...] = (
    (aten.gelu.default, {}), (aten.gelu.default, {"approximate": "tanh"}), (aten.silu.default, {}),
    (aten.relu.default, {}), (aten.sigmoid.default, {}), (aten.mish.default, {}), (aten.softplus.default, {}),
)  # fmt: skip


@dataclass(frozen=True)
class SpellActivations(Pass):
    """See the module."""

    def apply(self, program: Program) -> Program:
        known: dict[str, Any] = {}
        for node in reversed(list(program.graph.graph.nodes)):
            formula = None if node._erased else read_formula(node)
            if formula is not None:
                _rewrite(formula, known)
        drop_unused(program.graph)
        return program


@dataclass(frozen=True)
class Formula:
    """Pointwise `steps`, in order, from the one value `x` to the last of them."""

    x: fx.Node
    steps: tuple[fx.Node, ...]

    def text(self) -> str:
        """The same for formulas that are written alike, wherever they stand."""
        names = {self.x: "x"} | {step: f"_{i}" for i, step in enumerate(self.steps)}
        spelled = (fx.node.map_arg((s.args, s.kwargs), lambda n: _Word(names[n])) for s in self.steps)
        return "; ".join(
            f"{step.target}{arguments}" for step, arguments in zip(self.steps, spelled, strict=True)
        )

    def __call__(self, value: Tensor) -> Tensor:
        env: dict[fx.Node, Any] = {self.x: value}
        for step in self.steps:
            args, kwargs = fx.node.map_arg((step.args, step.kwargs), env.__getitem__)
            env[step] = step.target(*args, **kwargs)  # type: ignore[operator]
        return env[self.steps[-1]]


class _Word(str):
    """A string that prints without quotes."""

    def __repr__(self) -> str:
        return str(self)


def read_formula(last: fx.Node) -> Formula | None:
    """The formula that ends in `last`, or None when it starts from several values or is read in the
    middle."""
    members, leaves, stack = {last}, set[fx.Node](), [last]
    if not _is_step(last):
        return None
    while stack:
        for source in stack.pop().all_input_nodes:
            if not _is_step(source):
                leaves.add(source)
            elif source not in members:
                members.add(source)
                stack.append(source)
        if len(leaves) > 1 or len(members) > LARGEST:
            return None
    closed = all(user in members for node in members - {last} for user in node.users)
    if not closed or len(leaves) != 1 or len(members) < 2:
        return None
    x = leaves.pop()
    order = [node for node in last.graph.nodes if node in members]
    return Formula(x, tuple(order)) if _is_float(x) and x.op != "get_attr" else None


def _is_step(node: fx.Node) -> bool:
    target = node.target
    pure = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
    return pure and torch.Tag.nondeterministic_seeded not in target.tags and _is_float(node)  # type: ignore[union-attr]


def _is_float(node: fx.Node) -> bool:
    value = tensor(node)
    return value is not None and value.is_floating_point()


def _rewrite(formula: Formula, known: dict[str, Any]) -> None:
    last, text = formula.steps[-1], formula.text()
    if tensor(formula.x).dtype != tensor(last).dtype:  # type: ignore[union-attr]
        return
    if text not in known:
        known[text] = activation_of(formula)
    if known[text] is not None:
        target, kwargs = known[text]
        replace(last, call(last, target, (formula.x,), dict(kwargs)))


def activation_of(formula: Callable[[Tensor], Tensor]) -> tuple[Any, dict[str, Any]] | None:
    """The activation that has the values and slopes of `formula` on the whole grid, or None."""
    found = _values_and_slopes(formula)
    for target, kwargs in ACTIVATIONS:
        needed = _values_and_slopes(lambda x, target=target, kwargs=kwargs: target(x, **kwargs))  # type: ignore[misc]
        if all(_agree(a, b) for a, b in zip(found, needed, strict=True)):
            return target, kwargs
    return None


def _values_and_slopes(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        x = GRID.clone().requires_grad_(True)
        values = function(x)
        (slopes,) = torch.autograd.grad(values.sum(), x, allow_unused=True, materialize_grads=True)
    return values.detach(), slopes


def _agree(found: Tensor, needed: Tensor) -> bool:
    if found.shape != needed.shape or found.dtype != needed.dtype:
        return False
    return bool(((found - needed).abs() <= TOLERANCE * needed.abs().clamp(min=1.0)).all())
