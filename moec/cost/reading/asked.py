"""What torch itself says of a call: which results share memory with operands, and what autograd keeps.

The call is made once on tensors without memory (torch's fake tensors, on a CPU, as eager execution would),
with numbers for letters, and the answer is read as expressions again. Calls that look alike are asked once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from moec.cost.reading.samples import FIRST, SECOND, Samples, meant
from moec.cost.reading.value import Value, values_of
from moec.errors import OperatorError
from moec.ir.patterns import arguments_of

Numel = Callable[[Sequence[Value]], sympy.Expr]


@dataclass(frozen=True)
class Answer:
    """`views`: for each result the operand whose memory it is, by number, or None; `learns`: whether it needs
    a gradient. `kept`: operands, and results after them, that autograd keeps; `extra`: bytes that it keeps
    beside them, each as (itemsize, number of elements of the operands and results)."""

    views: tuple[int | None, ...]
    learns: tuple[bool, ...]
    kept: tuple[int, ...] = ()
    extra: tuple[tuple[int, Numel], ...] = ()


class Oracle:
    """Asks torch about the calls of one graph."""

    def __init__(self, letters: dict[Any, sympy.Expr]) -> None:
        self.letters = letters
        self.points = Samples(FIRST), Samples(SECOND)
        self._mode = FakeTensorMode(shape_env=ShapeEnv())
        self._known: dict[Any, Answer] = {}

    def ask(self, node: fx.Node, known: dict[fx.Node, Any]) -> Answer:
        """The answer for the call `node`, whose operands are `known`."""
        first = _Call(node, known, self.points[0])
        if first.key not in self._known:
            with self._mode:
                self._known[first.key] = self._answer(first, node, known)
        return self._known[first.key]

    def _answer(self, call: _Call, node: fx.Node, known: dict[fx.Node, Any]) -> Answer:
        first = call.run()
        if not first.extra:
            return Answer(first.views, first.learns, first.kept)
        second = _Call(node, known, self.points[1]).run()
        both = zip(first.extra, second.extra, strict=True)
        extra = tuple((a.itemsize, self._numel(a.numel(), b.numel(), first, second)) for a, b in both)
        return Answer(first.views, first.learns, first.kept, extra)

    def _numel(self, one: int, two: int, first: _Run, second: _Run) -> Numel:
        """A number of elements, seen for both points, as an expression of operands and results."""
        for place, (a, b) in enumerate(zip(first.tensors, second.tensors, strict=True)):
            for start, end in ((0, None), (0, -1), (-1, None)):
                if (a.shape[start:end].numel(), b.shape[start:end].numel()) == (one, two):
                    return _part_of(place, start, end)
        return self._of_letters(one, two, str(first.target))

    def _of_letters(self, one: int, two: int, target: str) -> Numel:
        """A product of letters and a number."""
        a, b = (point.numbers for point in self.points)
        for count in range(4):
            for chosen in itertools.combinations_with_replacement(b, count):
                here, there = sympy.prod([a[s] for s in chosen]), sympy.prod([b[s] for s in chosen])
                if one % here == 0 and one * there == two * here:
                    letters = [self.letters.get(symbol, symbol) for symbol in chosen]
                    found = sympy.Integer(one // here) * sympy.prod(letters)
                    return _always(found)
        raise OperatorError(target, f"{one} kept elements", "a product of batch, sequence and sizes")


def _always(size: sympy.Expr) -> Numel:
    return lambda values: size


def _part_of(place: int, start: int, end: int | None) -> Numel:
    return lambda values: sympy.prod((values[place].sizes or ())[start:end])


@dataclass
class _Run:
    """What a call did with its `tensors` (operands, then results)."""

    target: Any
    tensors: list[Tensor]
    views: tuple[int | None, ...]
    learns: tuple[bool, ...]
    kept: tuple[int, ...]
    extra: list[Tensor]


class _Call:
    """A call with numbers for letters, not yet made."""

    def __init__(self, node: fx.Node, known: dict[fx.Node, Any], point: Samples) -> None:
        def operand(other: fx.Node) -> Any:
            return _Operand(meant(other, known[other]), known[other])

        given = fx.map_arg(arguments_of(node), operand)
        leaves, self.spec = pytree.tree_flatten(given)
        self.leaves = [self._number(leaf, point) for leaf in leaves]
        self.point, self.target = point, node.target
        described = tuple(
            leaf.described(point) if isinstance(leaf, _Operand) else leaf for leaf in self.leaves
        )
        self.key = (str(node.target), str(self.spec), described)

    @staticmethod
    def _number(leaf: Any, point: Samples) -> Any:
        value = leaf.value if isinstance(leaf, _Operand) else leaf
        if isinstance(value, Value):
            return value.known
        return leaf if isinstance(value, Tensor) else point.size(value) if _is_size(value) else value

    def run(self) -> _Run:
        """Make it."""
        made = [leaf.tensor(self.point) if isinstance(leaf, _Operand) else leaf for leaf in self.leaves]
        operands = [leaf for leaf in made if isinstance(leaf, Tensor)]
        kept: list[Tensor] = []
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_keeper(kept), lambda held: held):
            results = _called(self.target, pytree.tree_unflatten(made, self.spec))
        results = [leaf for leaf in pytree.tree_leaves(results) if isinstance(leaf, Tensor)]
        places = {_memory(tensor): place for place, tensor in reversed(list(enumerate(operands)))}
        views = tuple(places.get(_memory(result)) for result in results)
        learns = tuple(result.requires_grad for result in results)
        tensors = operands + results
        all_places = {_memory(tensor): place for place, tensor in reversed(list(enumerate(tensors)))}
        storages = {_memory(tensor): tensor for tensor in kept}
        found = tuple(sorted(all_places[memory] for memory in storages if memory in all_places))
        extra = [tensor for memory, tensor in storages.items() if memory not in all_places]
        return _Run(self.target, tensors, views, learns, found, extra)


@dataclass(frozen=True)
class _Operand:
    """An argument that is a node: what the graph says of it and what is known."""

    value: Any
    known: Any

    def described(self, point: Samples) -> Any:
        return point.shape(self.value), self.value.dtype, self._needs_grad

    def tensor(self, point: Samples) -> Tensor:
        return point.tensor(self.value, self._needs_grad)

    @property
    def _needs_grad(self) -> bool:
        return any(value.needs_grad for value in values_of(self.known))


def _is_size(value: Any) -> bool:
    return isinstance(value, torch.SymInt)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _keeper(kept: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    return keep


def _called(operator: Any, arguments: Sequence[Any]) -> Any:
    """`operator` of all its arguments, in the order of the schema; on a CPU, whatever device they name."""
    declared = operator._schema.arguments
    pairs = list(zip(declared, arguments, strict=True))
    named = {one.name: value for one, value in pairs if one.kwarg_only and one.name != "device"}
    return operator(*(value for one, value in pairs if not one.kwarg_only), **named)
