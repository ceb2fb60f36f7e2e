"""What is known of a value while a graph is read: its sizes as expressions, and never its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from moec.cost.reading.rows import Rows

Sizes = tuple[sympy.Expr, ...]


@dataclass(frozen=True)
class Memory:
    """What results of the operation `made` lie in: `bytes` in all; told apart by `number`."""

    number: int
    made: int
    bytes: sympy.Expr


@dataclass(frozen=True)
class Value:
    """One result of a node.

    `made`: the operations that it comes of, by index; `pulls`: those that its gradient goes to next.
    `weight`: the name of a parameter or buffer as the program holds it. `memory`: where it lies, together
    with all views of it; None for weights and what the program is given.
    """

    sizes: Sizes | None
    dtype: torch.dtype = torch.float32
    needs_grad: bool = False
    weight: str = ""
    table: Rows | None = None
    memory: Memory | None = None
    made: frozenset[int] = field(default=frozenset())
    known: Any = None  # a size or number that the graph computes
    pulls: frozenset[int] = field(default=frozenset())

    @property
    def bytes(self) -> sympy.Expr:
        """Of all its elements."""
        return sympy.Integer(self.dtype.itemsize) * math.prod(self.sizes or ())


def values_of(known: Any) -> list[Value]:
    """The values in what is known of a node."""
    if isinstance(known, Mapping):
        return values_of(list(known.values()))
    if isinstance(known, list | tuple):
        return [value for item in known for value in values_of(item)]
    return [known] if isinstance(known, Value) else []
