"""Numbers for the amounts of a cost: every distinct expression is computed once, for any letters.

    evaluator = Evaluator(cost.operations)
    amounts = evaluator(B=8, S=1024, tensor=4)      # numbers, or numpy arrays of them

The expressions of all operations are read once into one list of instructions, in which what occurs twice
stands once. Operations that are alike in everything that takes time (the layers of a deep model) are one
`Task`, so they are also priced once.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import sympy
from sympy.functions.elementary.piecewise import ExprCondPair

from moec.cost.letters import missing
from moec.cost.operation import Operation, Sending
from moec.errors import CostError
from moec.runtime.ops.work import Product, Work


@dataclass(frozen=True)
class Send:
    """What a task sends: an axis, a collective, and where its amounts stand."""

    axis: str
    operator: str
    messages: int
    bytes: int


@dataclass(frozen=True)
class Task:
    """One direction of operations that cost the same; `sample` is one of them.

    Numbers are places in the list of amounts: of each product (m, n, k, groups), of the rest of the work, and
    of the bytes of weights.
    """

    operator: str
    kind: str
    dtype: str
    direction: str
    products: tuple[tuple[int, int, int, int, str], ...]
    read: int
    written: int
    calls: int
    weights: int
    sends: tuple[Send, ...]


class Evaluator:
    """`tasks`: the distinct ones; `forward`, `backward`: operation → its task there, by index."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        self.operations = tuple(operations)
        self._tape = _Tape()
        self._places: dict[Task, int] = {}
        self.forward = [self._task(one, "forward", one.forward, one.sends) for one in operations]
        self.backward = [self._task(one, "backward", one.backward, one.sends_back) for one in operations]
        self.tasks = list(self._places)

    def __call__(self, letters: Mapping[str, Any]) -> list[Any]:
        """All distinct amounts, by place; numbers that are arrays give arrays.

        Raises `CostError` for a letter that has no number, with its meaning.
        """
        return self._tape.run(letters)

    @property
    def letters(self) -> frozenset[str]:
        """The letters that stand in any amount."""
        return frozenset(self._tape.letters)

    def _task(self, one: Operation, direction: str, work: Work, sends: Sequence[Sending]) -> int:
        at = self._tape.place
        made = Task(
            one.operator,
            one.kind,
            one.dtype,
            direction,
            tuple((at(p.m), at(p.n), at(p.k), at(p.groups), p.along) for p in work.products),
            at(work.read),
            at(work.written),
            at(work.calls),
            at(one.weights),
            tuple(Send(each.axis, each.operator, at(each.messages), at(each.bytes)) for each in sends),
        )
        return self._places.setdefault(made, len(self._places))


def numbered(task: Task, amounts: Sequence[Any]) -> Work:
    """The work of a task with numbers in it."""
    products = tuple(
        Product(amounts[m], amounts[n], amounts[k], amounts[groups], along)
        for m, n, k, groups, along in task.products
    )
    return Work(products, amounts[task.read], amounts[task.written], amounts[task.calls])


class _Tape:
    """Instructions that compute expressions one after the other, each from places before it."""

    def __init__(self) -> None:
        self.letters: dict[str, int] = {}
        self._start: list[float] = []
        self._code: list[tuple[Callable[..., Any], tuple[int, ...], int]] = []
        self._known: dict[Any, int] = {}
        self._same: dict[int, tuple[Any, int]] = {}

    def place(self, amount: Any) -> int:
        """Where the value of `amount` will stand."""
        # By identity first: comparing two large expressions takes longer than computing them.
        seen = self._same.get(id(amount))
        if seen is None:
            seen = self._same[id(amount)] = (amount, self._read(sympy.sympify(amount)))
        return seen[1]

    def run(self, letters: Mapping[str, Any]) -> list[Any]:
        """All values, for these numbers."""
        values: list[Any] = list(self._start)
        for letter, place in self.letters.items():
            if letter not in letters:
                raise missing(letter)
            values[place] = letters[letter]
        for compute, operands, place in self._code:
            values[place] = compute([values[one] for one in operands])
        return values

    def _read(self, expr: sympy.Expr) -> int:
        if expr in self._known:
            return self._known[expr]
        if expr.is_Number:
            place = self._add(float(expr))
        elif expr.is_Symbol:
            place = self.letters[str(expr)] = self._add(math.nan)
        else:
            operands = tuple(map(self._read, expr.args))
            place = self._add(math.nan)
            self._code.append((_COMPUTE.get(expr.func) or _other(expr.func), operands, place))
        self._known[expr] = place
        return place

    def _add(self, value: float) -> int:
        self._start.append(value)
        return len(self._start) - 1


def _largest(values: Sequence[Any]) -> Any:
    return reduce(np.maximum, values) if _arrays(values) else max(values)


def _smallest(values: Sequence[Any]) -> Any:
    return reduce(np.minimum, values) if _arrays(values) else min(values)


def _arrays(values: Sequence[Any]) -> bool:
    return any(isinstance(value, np.ndarray) for value in values)


def _power(values: Sequence[Any]) -> Any:
    base, exponent = values
    return base**exponent


def _case(values: Sequence[Any]) -> Any:
    """The value of the first case that holds; a case is a pair (value, whether it holds)."""
    if any(_arrays(case) for case in values):
        return np.select([holds for _, holds in values], [value for value, _ in values], np.nan)
    found = next((value for value, holds in values if holds), None)
    if found is None:
        raise CostError("cost", "no case that holds", "ranks that the experts of a layer can be dealt out to")
    return found


_COMPUTE: dict[Any, Callable[[Sequence[Any]], Any]] = {
    sympy.Add: sum,
    sympy.Mul: lambda values: reduce(operator.mul, values),
    sympy.Pow: _power,
    sympy.Piecewise: _case,
    ExprCondPair: tuple,
    sympy.Eq: lambda values: values[0] == values[1],
    sympy.Max: _largest,
    sympy.Min: _smallest,
    sympy.ceiling: lambda values: np.ceil(values[0]) if _arrays(values) else math.ceil(values[0]),
    sympy.floor: lambda values: np.floor(values[0]) if _arrays(values) else math.floor(values[0]),
}


def _other(function: Any) -> Callable[[Sequence[Any]], Any]:
    """Any other function of sympy, by sympy's own numpy code."""

    def compute(values: Sequence[Any]) -> Any:
        names = [sympy.Symbol(f"x{place}") for place in range(len(values))]
        return sympy.lambdify(names, function(*names), "numpy")(*values)

    return compute
