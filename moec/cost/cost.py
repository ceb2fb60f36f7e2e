"""`Cost`: what a program costs one rank, operator by operator, as expressions one can compute with.

cost = program.cost()                     # a training step; phase="forward", "decode"
print(cost)                               # a table by kind of work
cost.flops                                # an expression in B and S
cost.at(B=8, S=1024).flops                # numbers
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import sympy

from moec.ir.mesh import Mesh

from .operation import Operation
from .symbols import symbol


@dataclass(frozen=True)
class Cost:
    """The operations of one rank of a program, and the axes they were read with.

    `phase`: `training` (forward and backward), `forward`, or `decode` (one step of the derived decoder).
    `axes`: letter of each axis → its ranks in this program. Amounts are expressions in the letters of
    `moec.cost.symbols`; those of axes are in them until `here` or `at` puts numbers there.
    """

    operations: tuple[Operation, ...]
    phase: str
    mesh: Mesh = field(default=Mesh())

    @property
    def axes(self) -> dict[sympy.Symbol, int]:
        """The letters of the axes and the numbers of ranks they have here."""
        return {symbol(axis): ranks for axis, ranks in self.mesh.axes().items()}

    @cached_property
    def forward_flops(self) -> sympy.Expr:
        """Of the matrix products of a forward run, on this rank."""
        return self._sum(lambda one: one.forward.flops)

    @cached_property
    def backward_flops(self) -> sympy.Expr:
        """Of the matrix products of the gradients."""
        return self._sum(lambda one: one.backward.flops)

    @property
    def flops(self) -> sympy.Expr:
        """Forward and backward."""
        return self.forward_flops + self.backward_flops

    def _sum(self, amount: Callable[[Operation], Any]) -> sympy.Expr:
        return sympy.Add(*map(amount, self.operations))

    def number(self, amount: Any, **letters: int) -> float:
        """An amount with numbers for its letters; axes that are not given are as they are here.

        Raises `KeyError`, naming the letter, where one is missing.
        """
        given: Mapping[sympy.Symbol, Any] = self.axes | {symbol(name): n for name, n in letters.items()}
        found = sympy.sympify(amount).subs(given)
        if found.free_symbols:
            raise KeyError(", ".join(sorted(map(str, found.free_symbols))))
        return int(found) if found.is_Integer else float(found)
