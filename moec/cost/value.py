"""What is known of a value while a graph is read: its sizes as expressions, and never its numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch

from moec.runtime.ops.work import Load

Sizes = tuple[sympy.Expr, ...]


@dataclass(frozen=True)
class Table:
    """What is known of counts of rows by expert: `rows`, all together, and who drew them.

    Each of `tokens` tokens chose `top_k` of `experts` experts, so that an expert is left out by all of them
    with probability (1 - top_k / experts) ** tokens.
    """

    rows: sympy.Expr
    tokens: sympy.Expr
    top_k: int
    experts: int

    def of_ranks(self, ranks: sympy.Expr) -> Table:
        """The table of as many ranks, all with as many rows as this one."""
        return replace(self, rows=self.rows * ranks, tokens=self.tokens * ranks)

    def arrived(self, ranks: sympy.Expr) -> Table:
        """What one of `ranks` ranks gets when each deals its rows out to all: as many rows of more tokens."""
        return replace(self, tokens=self.tokens * ranks)

    def load(self, experts: sympy.Expr) -> Load:
        """The load of `experts` of the experts."""
        share = sympy.Rational(self.top_k, self.experts)
        return Load(self.rows, experts * (1 - (1 - share) ** self.tokens))


@dataclass(frozen=True)
class Value:
    """One result of a node. `made`: the operations that it comes of, by index; `weight`: a parameter or
    buffer as the program holds it."""

    sizes: Sizes | None
    dtype: torch.dtype = torch.float32
    needs_grad: bool = False
    weight: str = ""
    table: Table | None = None
    made: frozenset[int] = field(default=frozenset())
    known: Any = None  # a size or number that the graph computes

    @property
    def bytes(self) -> sympy.Expr:
        """Of all its elements."""
        return sympy.Integer(self.dtype.itemsize) * math.prod(self.sizes or ())
