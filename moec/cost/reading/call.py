"""A call in a graph as the formulas of operators see it (`moec.runtime.ops.work.Call`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
from torch import fx

from moec.cost.reading.asked import Answer
from moec.cost.reading.value import Value, values_of
from moec.ir.patterns import arguments_of
from moec.runtime.ops.work import Amount, Load


class GraphCall:
    """`node`, its arguments replaced by what is known of them.

    `attention`: by which kind of kernel torch computes it, `flash` or `math` (`operators/attention.py`).
    """

    attention: str = "flash"

    def __init__(self, node: fx.Node, known: dict[fx.Node, Any], results: Any, training: bool) -> None:
        names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
        given = fx.map_arg(arguments_of(node), lambda other: known[other])
        self.node, self.arguments = node, dict(zip(names, given, strict=True))
        self.results: list[Value] = values_of(results)
        self.answer = Answer((), ())
        self._training = training

    @property
    def training(self) -> bool:
        return self._training

    def has(self, name: str) -> bool:
        return bool(self.values(name))

    def shape(self, name: str) -> tuple[Amount, ...]:
        (value,) = self.values(name)
        return value.sizes or ()

    def bytes(self, name: str) -> Amount:
        return sum((value.bytes for value in self.values(name)), sympy.Integer(0))

    def itemsize(self, name: str) -> int:
        return self.values(name)[0].dtype.itemsize

    def needs_grad(self, name: str) -> bool:
        return any(value.needs_grad for value in self.values(name))

    def is_weight(self, name: str) -> bool:
        return any(value.weight for value in self.values(name))

    def value(self, name: str) -> Any:
        given = self.arguments[name]
        return given.known if isinstance(given, Value) else given

    def tensors(self, name: str) -> Sequence[tuple[Amount, ...]]:
        return [value.sizes or () for value in self.values(name)]

    def load(self, name: str) -> Load:
        (value,) = self.values(name)
        assert value.table is not None, f"{self.node}: no counts are known of {name}"
        return value.table.load

    def result(self, index: int = 0) -> tuple[Amount, ...]:
        return self.results[index].sizes or ()

    def result_bytes(self, index: int | None = None) -> Amount:
        chosen = self.results if index is None else [self.results[index]]
        return sum((value.bytes for value in chosen), sympy.Integer(0))

    @property
    def tensor_results(self) -> bool:
        """Whether it gives tensors (and not a size alone, or nothing)."""
        return any(value.sizes is not None for value in self.results)

    @property
    def inputs(self) -> list[Value]:
        """All operands, in the order of the schema: what `Answer` numbers."""
        return [value for name in self.arguments for value in self.values(name)]

    @property
    def learns(self) -> bool:
        """Whether an operand needs a gradient."""
        return any(value.needs_grad for value in self.inputs)

    @property
    def operands(self) -> list[str]:
        """The names of all arguments that are tensors."""
        return [name for name in self.arguments if self.has(name)]

    def values(self, name: str) -> list[Value]:
        """The tensors in an argument."""
        given = self.arguments[name]
        items = given if isinstance(given, list | tuple) else [given]
        return [item for item in items if isinstance(item, Value) and item.sizes is not None]
