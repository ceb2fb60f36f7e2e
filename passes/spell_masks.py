"""Spell masks in the shortest way: causal attention as such, other comparisons of positions over [S, S].

before:  forty lines of aranges, lookups and comparisons;  scaled_dot_product_attention(q, k, v, mask)
after:   scaled_dot_product_attention(q, k, v, is_causal=True)

before:  twenty more for a sliding window
after:   i = arange(S);  rows = unsqueeze(i, -1);  mask = (i <= rows) & (i > rows - 4)

A mask is understood as a formula of its indices (`index_expressions.py`), so it does not matter how it was
made. Buffers are data, not formulas, and stay.

Assumes: `spell_attention` ran; no row is masked completely, which holds for every mask that shows a token
itself.
Contract: exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from moec.ir import Pass, Program
from moec.ir.dependence import token_dependent
from moec.ir.graphs import drop_unused, placeholder
from moec.ir.patterns import argument, call, is_call, tensor

from .index_expressions import Formula, index, index_formulas, is_truth
from .spell_attention import NOTHING

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
CAUSAL = index(1) - index(2)


@dataclass(frozen=True)
class SpellMasks(Pass):
    """See the module."""

    def apply(self, program: Program) -> Program:
        graph = program.graph.graph
        known = _Masks(graph)
        for node in list(graph.nodes):
            if is_call(node, ATTENTION):
                _attention(node, known)
            elif is_call(
                node, aten.add.Tensor, aten.masked_fill.Scalar, aten.where.self, aten.where.ScalarOther
            ):
                _written_out(node, known)
        drop_unused(program.graph)
        return program


class _Masks:
    """The masks of a graph by formula; each is built once."""

    def __init__(self, graph: fx.Graph) -> None:
        self.formulas, self.says = index_formulas(graph), token_dependent(graph)
        self.tokens = placeholder(graph)
        self.indices: fx.Node | None = None
        self.built: dict[Any, fx.Node] = {}

    def terms(self, node: Any) -> frozenset[Formula] | None:
        """What must be at most 0 for a position to be seen, when `node` is a mask of comparisons joined by
        *and*."""
        formula = self.formulas.get(node)
        shown = formula if is_truth(formula) else _shown(formula)
        parts = sympy.And.make_args(shown) if shown is not None else ()
        terms = [_at_most_zero(part) for part in parts]
        square = {index(1), index(2)}
        if not terms or any(term is None or not term.free_symbols <= square for term in terms):
            return None
        return frozenset(terms)

    def build(self, before: fx.Node, terms: frozenset[Formula]) -> fx.Node | None:
        """The mask bool [S, S] of `terms`, made right after the sizes; None when a term is of another
        kind."""
        if terms not in self.built:
            shifts = {term: _shift(term) for term in terms}
            if any(shift is None for shift in shifts.values()) or CAUSAL not in terms:
                return None
            self.built[terms] = self._made(before, shifts)  # type: ignore[arg-type]
        return self.built[terms]

    def _made(self, before: fx.Node, shifts: dict[Formula, tuple[int, int]]) -> fx.Node:
        columns = self._columns(before)
        rows = call(before, aten.unsqueeze.default, (columns, -1))
        mask = None
        for _, (sign, shift) in sorted(shifts.items(), key=lambda item: -item[1][0]):
            # sign 1: column - row + shift ≤ 0; sign -1: row - column + shift ≤ 0
            moved = call(before, aten.sub.Tensor, (rows, sign * shift)) if shift else rows
            part = call(before, aten.le.Tensor if sign == 1 else aten.ge.Tensor, (columns, moved))
            mask = part if mask is None else call(before, aten.logical_and.default, (mask, part))
        assert mask is not None
        return mask

    def _columns(self, before: fx.Node) -> fx.Node:
        length = call(before, aten.sym_size.int, (self.tokens, 1))
        value = tensor(self.tokens)
        assert value is not None
        return call(before, aten.arange.default, (length,), {"device": value.device})


def _shown(formula: Formula | None) -> Formula | None:
    """The condition of a mask that is added: 0 where a position is seen, next to nothing where it is not."""
    if not isinstance(formula, sympy.Piecewise):
        return None
    (yes, condition), (no, _) = formula.args
    if yes == 0 and no <= NOTHING:
        return condition
    return sympy.Not(condition) if no == 0 and yes <= NOTHING else None


def _at_most_zero(part: Formula) -> Formula | None:
    """`a <= b` and its kin over whole numbers as the one expression that must be at most 0."""
    if isinstance(part, sympy.Le | sympy.Lt):
        return sympy.expand(part.lhs - part.rhs + (1 if isinstance(part, sympy.Lt) else 0))
    if isinstance(part, sympy.Ge | sympy.Gt):
        return sympy.expand(part.rhs - part.lhs + (1 if isinstance(part, sympy.Gt) else 0))
    return None


def _shift(term: Formula) -> tuple[int, int] | None:
    """(1, c) for `i1 - i2 + c`, (-1, c) for `i2 - i1 + c`."""
    for sign in (1, -1):
        rest = sympy.expand(term - sign * CAUSAL)
        if rest.is_Integer:
            return sign, int(rest)
    return None


def _attention(node: fx.Node, known: _Masks) -> None:
    mask = argument(node, 3, "attn_mask")
    terms = known.terms(mask)
    if terms is None or argument(node, 5, "is_causal", False) is not False:
        return
    if terms == {CAUSAL}:
        rest = {name: value for name, value in node.kwargs.items() if name != "attn_mask"}
        dropout = argument(node, 4, "dropout_p", 0.0)
        rest.pop("dropout_p", None)
        node.args, node.kwargs = (*node.args[:3], None, dropout, True), rest
        return
    built = known.build(node, terms)
    if built is not None:
        node.replace_input_with(mask, built)


def _written_out(node: fx.Node, known: _Masks) -> None:
    """A mask that softmax attention adds, or chooses by: the same numbers over [S, S], broadcast by the
    operator."""
    for position, mask in enumerate(node.args):
        terms = known.terms(mask) if node in known.says and isinstance(mask, fx.Node) else None
        built = _rebuilt(node, mask, terms, known) if terms is not None else None
        if built is not None:
            node.update_arg(position, built)


def _rebuilt(node: fx.Node, mask: Any, terms: frozenset[Formula], known: _Masks) -> fx.Node | None:
    formula, value = known.formulas[mask], mask.meta["val"]
    assert isinstance(value, Tensor)
    built = known.build(node, terms) if value.dim() > 2 else None
    if built is None or is_truth(formula):
        return built
    (yes, condition), (no, _) = formula.args
    numbers = (float(yes), float(no)) if _shown(formula) == condition else (float(no), float(yes))
    key = (terms, numbers, value.dtype)
    if key not in known.built:
        chosen = call(node, aten.where.Scalar, (built, *numbers))
        same = tensor(chosen).dtype == value.dtype  # type: ignore[union-attr]
        known.built[key] = chosen if same else call(node, aten.to.dtype, (chosen, value.dtype))
    return known.built[key]
