"""A formula as a list of steps: for running it, for its derivatives, and for whoever generates kernels.

Values are numbered: first the leaves, then the result of each step. A step's operands are such numbers, or
`Number`s. Nothing is computed twice, and nothing that no result needs.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from torch import Tensor

from moec.runtime.ops.formula_functions import FUNCTIONS, names_in, power
from moec.runtime.ops.formula_tree import Expression, Leaf, Number

Operand = int | Number
_FOLDS = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv}
_SIGNS = {ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div"}


@dataclass(frozen=True)
class Step:
    """One call: value number `len(leaves) + i` for the i-th step is `function` of `operands`."""

    function: str
    operands: tuple[Operand, ...]


@dataclass(frozen=True)
class Schedule:
    """Steps from `leaves` to `results`; a result is a value number, or a `Number` where it is constant."""

    leaves: tuple[Leaf, ...]
    steps: tuple[Step, ...]
    results: tuple[Operand, ...]

    def run(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The results for one tensor a leaf, all of one shape; a value is let go after its last use."""
        env: list[Any] = list(values)
        for index, step in enumerate(self.steps):
            operands = [o.value if isinstance(o, Number) else env[o] for o in step.operands]
            env.append(FUNCTIONS[step.function].compute(*operands))
            for number in self._dies_at[index]:
                env[number] = None
        return [values[0].new_full(values[0].shape, r.value) if isinstance(r, Number) else env[r]
                for r in self.results]  # fmt: skip

    @cached_property
    def _dies_at(self) -> list[list[int]]:
        """For each step, the values that nothing after it reads."""
        last: dict[int, int] = {}
        for index, step in enumerate(self.steps):
            last |= {operand: index for operand in step.operands if isinstance(operand, int)}
        kept = set(self.results)
        return [
            [n for n, at in last.items() if at == index and n not in kept] for index in range(len(self.steps))
        ]

    def spelled(self) -> Schedule:
        """The same with every function taken apart into primitives: what a kernel generator reads."""
        return _spelled(self)

    def keep(self, results: Sequence[int]) -> Schedule:
        """The schedule for some of the results alone (their places in `results`), leaves all kept."""
        return _pruned(self.leaves, self.steps, tuple(self.results[place] for place in results))


def _pruned(leaves: tuple[Leaf, ...], steps: Sequence[Step], results: tuple[Operand, ...]) -> Schedule:
    first = len(leaves)
    needed = {result for result in results if isinstance(result, int)}
    for index in reversed(range(len(steps))):
        if first + index in needed:
            needed |= {operand for operand in steps[index].operands if isinstance(operand, int)}
    builder = _Builder(leaves)
    number: dict[int, Operand] = {place: place for place in range(first)}
    for index, step in enumerate(steps):
        if first + index in needed:
            operands = [number[o] if isinstance(o, int) else o for o in step.operands]
            number[first + index] = builder.call(step.function, operands)
    return builder.schedule([number[r] if isinstance(r, int) else r for r in results])


@dataclass
class _Builder:
    """Numbers values; a call that was made before gives the same number again."""

    leaves: tuple[Leaf, ...]
    steps: list[Step] = field(default_factory=list)
    known: dict[Step, int] = field(default_factory=dict)

    def call(self, function: str, operands: Sequence[Operand]) -> Operand:
        folded = _fold(function, operands)
        if folded is not None:
            return folded
        step = Step(function, tuple(operands))
        if step not in self.known:
            self.known[step] = len(self.leaves) + len(self.steps)
            self.steps.append(step)
        return self.known[step]

    def expression(self, expression: Expression) -> Operand:
        if isinstance(expression, Leaf):
            return self.leaves.index(expression)
        if isinstance(expression, Number):
            return expression
        return self.call(
            expression.function, [self.expression(argument) for argument in expression.arguments]
        )

    def inline(self, text: str, bound: Mapping[str, Operand]) -> Operand:
        """The value of a formula of the table, whose names stand for operands."""
        return self._inline(_syntax(text), bound)

    def _inline(self, tree: ast.expr, bound: Mapping[str, Operand]) -> Operand:
        match tree:
            case ast.Name(id=name):
                return bound[name]
            case ast.Constant(value=value):
                return Number(value)  # type: ignore[arg-type]
            case ast.UnaryOp(operand=operand):
                return self.call("neg", [self._inline(operand, bound)])
            case ast.BinOp(left=left, op=sign, right=right):
                return self.call(_SIGNS[type(sign)], [self._inline(left, bound), self._inline(right, bound)])
            case ast.Call(func=ast.Name(id=name), args=arguments):
                return self.call(name, [self._inline(argument, bound) for argument in arguments])
        raise AssertionError(f"the table of functions says {ast.unparse(tree)}")

    def schedule(self, results: Sequence[Operand]) -> Schedule:
        return Schedule(self.leaves, tuple(self.steps), tuple(results))


def _fold(function: str, operands: Sequence[Operand]) -> Operand | None:
    """What needs no step: arithmetic on numbers, and a product with 0 or 1 or a sum with 0."""
    values = [operand.value if isinstance(operand, Number) else None for operand in operands]
    if all(value is not None for value in values):
        if function == "neg":
            return Number(-values[0])  # type: ignore[operator]
        return Number(_FOLDS[function](*values))
    if function == "mul" and 0 in values:
        return Number(0)
    if function == "mul" and 1 in values:
        return operands[1 - values.index(1)]
    if function in ("add", "sub") and values[-1] == 0:
        return operands[0]
    if function == "add" and values[0] == 0:
        return operands[1]
    return None


@lru_cache(maxsize=256)
def _syntax(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def forward_schedule(leaves: tuple[Leaf, ...], body: Expression) -> Schedule:
    """The steps of the expression `body` over `leaves`."""
    builder = _Builder(leaves)
    return builder.schedule([builder.expression(body)])


def backward_schedule(forward: Schedule, grad: Leaf) -> Schedule:
    """`forward` and its derivatives, from its leaves and `grad`: one result a leaf, and `forward`'s own last.

    Reverse accumulation (Griewank and Walther, Evaluating Derivatives, chapter 3) over the steps.
    """
    builder = _Builder((*forward.leaves, grad))
    first = len(forward.leaves)
    number: dict[int, Operand] = {place: place for place in range(first)}
    for index, step in enumerate(forward.steps):
        operands = [number[o] if isinstance(o, int) else o for o in step.operands]
        number[first + index] = builder.call(step.function, operands)
    arriving: dict[int, Operand] = {_value(forward.results[0]): first}
    for index in reversed(range(len(forward.steps))):
        if first + index in arriving:
            _pull(builder, forward.steps[index], number, first + index, arriving)
    gradients = [arriving.get(place, Number(0)) for place in range(first)]
    made = builder.schedule([*gradients, number[_value(forward.results[0])]])
    return _pruned(made.leaves, made.steps, made.results)


def _value(operand: Operand) -> int:
    assert isinstance(operand, int), "a formula reads its parameters"
    return operand


def _pull(
    builder: _Builder, step: Step, number: Mapping[int, Operand], place: int, arriving: dict[int, Operand]
) -> None:
    """Add to `arriving` what the value at `place`, computed by `step`, sends back to its operands."""
    operands = [number[o] if isinstance(o, int) else o for o in step.operands]
    bound = dict(zip("ab", operands, strict=False)) | {"g": arriving[place], "y": number[place]}
    for operand, text in zip(step.operands, _pullbacks(step), strict=False):
        if isinstance(operand, int):
            sent = builder.inline(text, bound)
            known = arriving.get(operand)
            arriving[operand] = sent if known is None else builder.call("add", [known, sent])


def _pullbacks(step: Step) -> tuple[str, ...]:
    if step.function == "pow":
        return (power(int(step.operands[1].value))[1],)  # type: ignore[union-attr]
    return FUNCTIONS[step.function].pullbacks


def _spelled(schedule: Schedule) -> Schedule:
    builder = _Builder(schedule.leaves)
    first = len(schedule.leaves)
    number: dict[int, Operand] = {place: place for place in range(first)}
    for index, step in enumerate(schedule.steps):
        operands = [number[o] if isinstance(o, int) else o for o in step.operands]
        number[first + index] = _spelled_call(builder, step.function, operands)
    results = [number[r] if isinstance(r, int) else r for r in schedule.results]
    simple = builder.schedule(results)
    return simple if all(FUNCTIONS[s.function].is_primitive for s in simple.steps) else _spelled(simple)


def _spelled_call(builder: _Builder, name: str, operands: Sequence[Operand]) -> Operand:
    function = FUNCTIONS[name]
    if function.is_primitive:
        return builder.call(name, operands)
    spelled = power(int(operands[1].value))[0] if name == "pow" else function.spelled  # type: ignore[union-attr]
    return builder.inline(spelled, dict(zip(names_in(function), operands, strict=False)))
