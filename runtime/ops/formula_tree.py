"""The expression tree of a formula, and how it prints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from moec.errors import OperatorError
from moec.runtime.ops.formula_functions import OPERATORS


@dataclass(frozen=True)
class Leaf:
    """A parameter, or elements `start`, `start + step`, … below `stop` of its last dim (None: to the end)."""

    name: str
    start: int = 0
    stop: int | None = None
    step: int = 1

    @property
    def is_whole(self) -> bool:
        """Whether this is the parameter itself."""
        return (self.start, self.stop, self.step) == (0, None, 1)

    def part(self, other: Leaf) -> Leaf:
        """The slice `other` (whose name does not count) of this slice."""
        stop = self.stop
        if other.stop is not None:
            below = self.start + other.stop * self.step
            stop = below if stop is None else min(stop, below)
        return Leaf(self.name, self.start + other.start * self.step, stop, self.step * other.step)

    def width(self, width: int) -> int:
        """How many elements of a parameter of this width are read; `OperatorError` when there are fewer."""
        stop = width if self.stop is None else self.stop
        # A step may end inside the last stride: h[..., 1:5:2] reads places 1 and 3.
        last = self.start + (stop - self.start - 1) // self.step * self.step if stop > self.start else 0
        if last >= width:
            raise OperatorError(
                f"formula: {spell(self)}", f"{self.name} of width {width}", f"{last + 1} or more"
            )
        return max(0, -(-(stop - self.start) // self.step))

    def places(self, width: int) -> range:
        """The places that are read of a parameter of this width."""
        return range(width)[self.start : self.stop : self.step]

    def of(self, tensor: Tensor) -> Tensor:
        """The view of `tensor` that this leaf reads."""
        return tensor if self.is_whole else tensor[..., self.start : self.stop : self.step]


@dataclass(frozen=True)
class Number:
    """A number as it was written."""

    value: int | float


@dataclass(frozen=True)
class Call:
    """A function (a name of `formula_functions.FUNCTIONS`) of expressions."""

    function: str
    arguments: tuple[Leaf | Number | Call, ...]


Expression = Leaf | Number | Call

_RANKS = {"add": 1, "sub": 1, "mul": 2, "div": 2, "neg": 3}
_ATOM = 4


def leaves_of(expression: Expression) -> Iterator[Leaf]:
    """Every leaf, from left to right, as often as it is read."""
    if isinstance(expression, Leaf):
        yield expression
    elif isinstance(expression, Call):
        for argument in expression.arguments:
            yield from leaves_of(argument)


def part_of(expression: Expression, part: Leaf) -> Expression:
    """The slice `part` (whose name does not count) of an expression: that of each of its leaves, since every
    element is by itself."""
    if isinstance(expression, Leaf):
        return expression.part(part)
    if isinstance(expression, Call):
        return Call(expression.function, tuple(part_of(argument, part) for argument in expression.arguments))
    return expression


def spell(expression: Expression) -> str:
    """The expression as a formula writes it, with the parentheses it needs and no others."""
    if isinstance(expression, Leaf):
        return _spell_leaf(expression)
    if isinstance(expression, Number):
        return repr(expression.value)
    arguments = expression.arguments
    if expression.function == "neg":
        return f"-{_inside(arguments[0], _RANKS['neg'])}"
    if expression.function in OPERATORS:
        rank = _RANKS[expression.function]
        left, right = _inside(arguments[0], rank), _inside(arguments[1], rank + 1)
        return f"{left} {OPERATORS[expression.function]} {right}"
    return f"{expression.function}({', '.join(map(spell, arguments))})"


def _spell_leaf(leaf: Leaf) -> str:
    if leaf.is_whole:
        return leaf.name
    start, stop = (leaf.start or ""), ("" if leaf.stop is None else leaf.stop)
    return f"{leaf.name}[..., {start}:{stop}{f':{leaf.step}' if leaf.step != 1 else ''}]"


def _inside(expression: Expression, rank: int) -> str:
    text = spell(expression)
    own = _RANKS.get(expression.function, _ATOM) if isinstance(expression, Call) else _ATOM
    if isinstance(expression, Number) and expression.value < 0:
        own = _RANKS["neg"]
    return text if own >= rank else f"({text})"
