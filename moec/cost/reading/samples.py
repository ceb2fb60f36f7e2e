"""Values of a graph with numbers for their letters: tensors to ask torch with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from moec.ir.graphs import attribute

SMALL = (2, 3, 5, 7, 11, 13, 17, 19)
FIRST = (10007, 10037, 10061, 10067, 10069, 10079, 10091, 10093)
SECOND = (20011, 20021, 20023, 20029, 20047, 20051, 20063, 20071)


class Samples:
    """Numbers for torch's symbols: each gets one of `primes`, in the order in which they appear."""

    def __init__(self, primes: Sequence[int]) -> None:
        self.primes, self.numbers = primes, dict[sympy.Symbol, int]()
        self._sizes: dict[sympy.Expr, int] = {}

    def size(self, size: Any) -> int:
        """A size of the graph as a number."""
        if isinstance(size, int):
            return size
        expression = size.node.expr
        known = self._sizes.get(expression)
        return self._number(expression) if known is None else known

    def _number(self, expression: sympy.Expr) -> int:
        for symbol in sorted(expression.free_symbols, key=str):
            self.numbers.setdefault(symbol, self._next())
        number = self._sizes[expression] = int(expression.xreplace(self.numbers))
        return number

    def _next(self) -> int:
        count = len(self.numbers)
        return self.primes[count % len(self.primes)] + 2 * self.primes[-1] * (count // len(self.primes))

    def shape(self, tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Sizes and strides of a value of the graph."""
        return tuple(map(self.size, tensor.shape)), tuple(map(self.size, tensor.stride()))

    def tensor(self, like: Tensor, needs_grad: bool) -> Tensor:
        """A tensor of these sizes and strides on a CPU; without memory under a fake mode."""
        sizes, strides = self.shape(like)
        return torch.empty_strided(sizes, strides, dtype=like.dtype, requires_grad=needs_grad)


def meant(node: fx.Node, known: Any) -> Any:
    """What `node` stands for: a tensor of the graph, a size, or the value that is `known` of it."""
    owner = node.graph.owning_module
    held = attribute(owner, str(node.target)) if owner is not None and node.op == "get_attr" else None
    value = held if isinstance(held, Tensor) else node.meta.get("val")
    return known if value is None else value
