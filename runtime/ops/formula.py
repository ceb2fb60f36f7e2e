"""Formulas: what stands between the up products of a feed-forward and its down product, as data.

A formula is written as a Python lambda over the results of the up products,

    "lambda gate, up: silu(gate) * up"          "lambda h: gelu(h[..., :64]) * h[..., 64:]"

and may hold names, numbers, ``+ - * /``, unary minus, slices of the last dim and calls of the words in
`formula_functions`. Everything acts on each element by itself. The text is read with `ast` and never run.

`read_formula(text)` gives a `Formula`: its `parameters`, its expression tree (`body`), and two schedules,
lists of steps in which nothing is computed twice, for kernels: `forward`, and `backward` with the
derivatives.

    tree       Leaf (a parameter, or a slice of its last dim) | Number | Call(function, arguments)
               slices of whole expressions are moved to the leaves: f(x)[..., :n] is f(x[..., :n])
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from torch import Tensor

from moec.errors import OperatorError, nearest
from moec.runtime.ops.formula_functions import FUNCTIONS, LARGEST_POWER, OPERATORS, WORDS
from moec.runtime.ops.formula_schedule import Schedule, backward_schedule, forward_schedule
from moec.runtime.ops.formula_tree import Call, Expression, Leaf, Number, leaves_of, part_of, spell

_SIGNS = {ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div"}
GRADIENT = "grad"  # what arrives at the result, in the schedule `backward`


@dataclass(frozen=True)
class Formula:
    """A formula that was read. Its `str()` is the canonical text, which reads back as the same formula."""

    parameters: tuple[str, ...]
    body: Expression

    def __str__(self) -> str:
        return f"lambda {', '.join(self.parameters)}: {spell(self.body)}"

    @cached_property
    def leaves(self) -> tuple[Leaf, ...]:
        """What the formula reads, each once, by parameter and then in order of first use."""
        found = dict.fromkeys(leaves_of(self.body))
        return tuple(sorted(found, key=lambda leaf: self.parameters.index(leaf.name)))

    @cached_property
    def forward(self) -> Schedule:
        """The steps from the leaves to the one result."""
        return forward_schedule(self.leaves, self.body)

    @cached_property
    def backward(self) -> Schedule:
        """The steps from the leaves and `grad` to the gradient of each leaf, and the result itself last."""
        return backward_schedule(self.forward, Leaf(GRADIENT))

    def width(self, widths: Sequence[int]) -> int:
        """The width of the result for parameters of these widths; `OperatorError` when leaves do not fit."""
        by_name = dict(zip(self.parameters, widths, strict=True))
        found = [leaf.width(by_name[leaf.name]) for leaf in self.leaves]
        if any(width != found[0] for width in found):
            shown = ", ".join(
                f"{spell(leaf)} [{width}]" for leaf, width in zip(self.leaves, found, strict=True)
            )
            raise OperatorError(f"formula '{self}'", shown, "parts of one width")
        return found[0]

    def apply(self, tensors: Sequence[Tensor]) -> Tensor:
        """The result [..., W] for one tensor a parameter, [..., W_i] each; autograd follows."""
        self.width([tensor.shape[-1] for tensor in tensors])
        by_name = dict(zip(self.parameters, tensors, strict=True))
        (result,) = self.forward.run([leaf.of(by_name[leaf.name]) for leaf in self.leaves])
        return result

    def pull_back(self, tensors: Sequence[Tensor], grad: Tensor) -> tuple[list[Tensor], Tensor]:
        """The gradient of each parameter, and the result again, for `grad` [..., W] at the result."""
        by_name = dict(zip(self.parameters, tensors, strict=True))
        values = [leaf.of(by_name[leaf.name]) for leaf in self.leaves]
        *gradients, result = self.backward.run([*values, grad])
        return self.assemble(by_name, gradients), result

    def assemble(self, by_name: Mapping[str, Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
        """The gradient of each parameter from those of its leaves (in the order of `leaves`)."""
        return [
            _assembled(by_name[name], [(leaf, g) for leaf, g in zip(self.leaves, gradients, strict=True)
                                       if leaf.name == name])
            for name in self.parameters
        ]  # fmt: skip


def _assembled(tensor: Tensor, parts: list[tuple[Leaf, Tensor]]) -> Tensor:
    if len(parts) == 1 and parts[0][0].is_whole:
        return parts[0][1]
    if _tile([leaf for leaf, _ in parts], tensor.shape[-1]):
        whole = tensor.new_empty(tensor.shape)
        for leaf, gradient in parts:
            leaf.of(whole).copy_(gradient)
        return whole
    whole = tensor.new_zeros(tensor.shape)
    for leaf, gradient in parts:
        leaf.of(whole).add_(gradient)
    return whole


def _tile(leaves: Sequence[Leaf], width: int) -> bool:
    """Whether the leaves cover every element once, so that nothing has to be cleared or added."""
    covered = [place for leaf in leaves for place in leaf.places(width)]
    return len(covered) == width == len(set(covered))


@lru_cache(maxsize=1024)
def read_formula(text: str) -> Formula:
    """The formula that `text` says; `OperatorError` names what is not in the language."""
    return _Reader(text).read()


class _Reader:
    """From a syntax tree of Python to a formula, refusing all that a formula may not hold."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.parameters: tuple[str, ...] = ()

    def read(self) -> Formula:
        try:
            tree = ast.parse(self.text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError) as error:
            raise self._error(f"{error}", "one lambda, such as 'lambda h: gelu(h)'") from None
        if not isinstance(tree, ast.Lambda):
            raise self._error(f"a {_kind(tree)}", "one lambda, such as 'lambda h: gelu(h)'")
        self.parameters = self._parameters(tree.args)
        body = self._expression(tree.body)
        unread = [name for name in self.parameters if name not in {leaf.name for leaf in leaves_of(body)}]
        if unread:
            raise self._error(
                f"a parameter that is not read: {', '.join(unread)}", "parameters that are read"
            )
        return Formula(self.parameters, body)

    def _error(self, found: str, needed: str, close: str = "") -> OperatorError:
        return OperatorError(f"formula '{self.text}'", found, needed, close)

    def _parameters(self, found: ast.arguments) -> tuple[str, ...]:
        names = tuple(argument.arg for argument in found.args)
        others = [found.posonlyargs, found.kwonlyargs, found.vararg, found.kwarg, found.defaults]
        if any(others) or not names:
            raise self._error("other than plain parameters", "lambda a, b: …")
        reserved = [name for name in names if name == GRADIENT or name in FUNCTIONS]
        if reserved:
            raise self._error(f"a parameter called {reserved[0]}", "a name that means nothing else")
        return names

    def _expression(self, tree: ast.expr) -> Expression:
        match tree:
            case ast.Name(id=name):
                return self._leaf(name)
            case ast.Constant(value=int() | float() as value) if _is_number(value):
                return Number(value)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self._call("neg", [self._expression(operand)])
            case ast.BinOp(op=sign) if type(sign) in _SIGNS:
                sides = [self._expression(tree.left), self._expression(tree.right)]
                return self._call(_SIGNS[type(sign)], sides)
            case ast.Call(func=ast.Name(id=name), keywords=[]):
                return self._word(name, [self._expression(argument) for argument in tree.args])
            case ast.Subscript():
                return self._sliced(tree)
        shown = ast.unparse(tree)
        raise self._error(f"{_kind(tree)} `{shown}`", "names, numbers, + - * /, [..., a:b] and known words")

    def _leaf(self, name: str) -> Leaf:
        if name not in self.parameters:
            close = nearest(name, self.parameters)
            raise self._error(f"the name {name}", f"one of {', '.join(self.parameters)}", close)
        return Leaf(name)

    def _word(self, name: str, arguments: list[Expression]) -> Expression:
        if name not in WORDS:
            raise self._error(f"the word {name}", f"one of {', '.join(WORDS)}", nearest(name, WORDS))
        return self._call(name, arguments)

    def _call(self, name: str, arguments: list[Expression]) -> Expression:
        function = FUNCTIONS[name]
        if len(arguments) != function.arguments:
            raise self._error(f"{len(arguments)} arguments of {name}", f"{function.arguments}")
        numbers = [isinstance(argument, Number) for argument in arguments]
        first = len(arguments) - function.numbers
        if not all(numbers[first:]):
            raise self._error(f"a value as the last argument of {name}", "a number")
        if all(numbers) or (first and all(numbers[:first])):
            return self._folded(name, arguments)
        if name == "pow" and not _is_power(arguments[1]):
            raise self._error(f"pow to {spell(arguments[1])}", f"a whole number, 2 to {LARGEST_POWER}")
        return Call(name, tuple(arguments))

    def _folded(self, name: str, arguments: list[Expression]) -> Number:
        """Arithmetic on numbers alone."""
        if name not in (*OPERATORS, "neg"):
            raise self._error(f"{name} of numbers alone", "a value")
        try:
            value = FUNCTIONS[name].compute(*(n.value for n in arguments if isinstance(n, Number)))
        except (ZeroDivisionError, OverflowError) as error:
            raise self._error(str(error), "a number") from None
        if not math.isfinite(value):
            raise self._error(f"numbers that give {value}", "a finite number")
        return Number(value)

    def _sliced(self, tree: ast.Subscript) -> Expression:
        match tree.slice:
            case ast.Tuple(elts=[ast.Constant(value=value), ast.Slice() as found]) if value is Ellipsis:
                bounds = [self._bound(bound) for bound in (found.lower, found.upper, found.step)]
            case _:
                raise self._error(f"`{ast.unparse(tree)}`", "a slice of the last dim, such as h[..., :64]")
        start, stop, step = bounds
        if step == 0:
            raise self._error(f"`{ast.unparse(tree)}`", "a step of at least 1")
        return part_of(self._expression(tree.value), Leaf("", start or 0, stop, step or 1))

    def _bound(self, tree: ast.expr | None) -> int | None:
        if tree is None:
            return None
        if isinstance(tree, ast.Constant) and type(tree.value) is int and tree.value >= 0:
            return tree.value
        raise self._error(f"the bound {ast.unparse(tree)}", "whole numbers, counted from the left")


def _is_number(value: float) -> bool:
    return not isinstance(value, bool) and math.isfinite(value)


def _is_power(exponent: Expression) -> bool:
    whole = isinstance(exponent, Number) and exponent.value == int(exponent.value)
    return whole and 2 <= exponent.value <= LARGEST_POWER  # type: ignore[union-attr]


def _kind(tree: ast.AST) -> str:
    return type(tree).__name__
