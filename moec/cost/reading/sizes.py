"""The sizes of values as expressions: batch and sequence by letter, a rank's part by the axis it lies on.

A graph of one rank says `[B, S, 24] · dim 2 over tensor`. Where the axis has 2 ranks that is `48/tensor`, so
the cost of the same text on another number of ranks can be read off this one. A size that no mark explains is
what the operands say of it (`proportions.py`), or a plain number.
"""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import fx

from moec.cost.reading.proportions import proposed
from moec.cost.reading.value import Sizes, Value
from moec.cost.symbols import symbol
from moec.ir.inputs import factors, inputs_of
from moec.ir.mesh import Mesh

_MARK = re.compile(r"dim (\d+) over (\w+)")


class SizeReader:
    """Reads sizes off one root graph; `letters`: torch's symbols → ours, those of rows included; `dealt`: the
    numbers that are dealt out to ranks, each with the axes (`24/tensor`)."""

    def __init__(self, root: fx.GraphModule, mesh: Mesh | None) -> None:
        self.axes = {axis: count for axis, count in (mesh.axes() if mesh else {}).items() if count > 1}
        self.letters: dict[Any, sympy.Expr] = {}
        self.dealt: set[sympy.Expr] = set()
        placeholders = [node for node in root.graph.nodes if node.op == "placeholder"]
        for node, given in zip(placeholders, inputs_of(root.graph), strict=True):
            for size, letter in zip(node.meta["val"].shape, given.sizes, strict=True):
                if isinstance(letter, str) and isinstance(size, torch.SymInt):
                    count, name = factors(letter)
                    if count == 1:
                        self.letters[size.node.expr] = symbol(name)

    @cached_property
    def at(self) -> dict[sympy.Symbol, sympy.Integer]:
        """The axes as they are in this graph."""
        return {symbol(axis): sympy.Integer(count) for axis, count in self.axes.items()}

    def noted(self, sizes: Sizes) -> Sizes:
        """The same sizes; those that ranks have an even part of are remembered."""
        for size in sizes:
            if size.free_symbols and size.free_symbols <= self.at.keys() and _is_dealt(size):
                self.dealt.add(size)
        return sizes

    def size(self, size: Any) -> sympy.Expr:
        """A size of the graph, its symbols named."""
        if isinstance(size, int):
            return sympy.Integer(size)
        return size.node.expr.xreplace(self.letters)

    def unknown(self, size: Any) -> Any:
        """The symbol of a size that depends on data and has no expression yet; else None."""
        if isinstance(size, int):
            return None
        return next((s for s in size.node.expr.free_symbols if s not in self.letters), None)

    def value(self, shape: Sequence[Any], node: fx.Node, operands: Sequence[Value]) -> Sizes:
        """The sizes of a result of `node`, computed from `operands`: by its mark, or what theirs say."""
        splits = {int(dim): axis for dim, axis in _MARK.findall(str(node.meta.get("placement") or ""))}
        proposals = proposed(node, operands, len(shape), self.axes)
        marked = {symbol(axis) for axis in splits.values()}
        return tuple(
            self._size(size, splits.get(dim), proposal, operands, marked)
            for dim, (size, proposal) in enumerate(zip(shape, proposals, strict=True))
        )

    def _size(
        self,
        size: Any,
        axis: str | None,
        proposal: sympy.Expr | None,
        operands: Sequence[Value],
        marked: Set[sympy.Symbol],
    ) -> sympy.Expr:
        """`marked`: axes that other dims are dealt out over; an axis deals out one dim of a value."""
        if not isinstance(size, int):
            return self.size(size)
        if axis in self.axes:
            return self._uneven(size, axis, operands) or self._split(sympy.Integer(size), axis)
        if proposal is None or not proposal.free_symbols <= self.at.keys() - marked:
            return sympy.Integer(size)
        return proposal if proposal.xreplace(self.at) == size else sympy.Integer(size)

    def _split(self, size: sympy.Expr, axis: str | None) -> sympy.Expr:
        ranks = self.axes.get(axis or "")
        return size if ranks is None else size * ranks / symbol(str(axis))

    def _uneven(self, size: int, axis: str | None, operands: Sequence[Value]) -> sympy.Expr | None:
        """A vocabulary may be dealt out unevenly; its part is what that of the weight is."""
        sizes = [known for operand in operands for known in operand.sizes or ()]
        uneven = [known for known in sizes if known.has(sympy.ceiling) and known.has(symbol(axis or ""))]
        return next((known for known in uneven if known.xreplace(self.at) == size), None)


def _is_dealt(size: sympy.Expr) -> bool:
    """Whether it is a number by axes; a vocabulary that is dealt out unevenly is none."""
    return bool(size.as_numer_denom()[0].is_Integer) and not size.has(sympy.ceiling)
