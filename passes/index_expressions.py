"""What a value made of positions is at each of its indices, as a formula.

`arange(S)[None, :] <= arange(S)[:, None]` is `i1 <= i2`: `i1` is the index along the last dim, `i2` along
the one
before. Numbers, indices, comparisons, and two numbers chosen by a comparison are followed through views,
broadcasting and lookups by index; whatever else there is has no formula.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import fx

from moec.ir.patterns import argument, tensor

aten = torch.ops.aten

Formula: TypeAlias = sympy.Basic

COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "le": sympy.Le, "lt": sympy.Lt, "ge": sympy.Ge, "gt": sympy.Gt, "eq": sympy.Eq, "ne": sympy.Ne,
}  # fmt: skip
CONNECTIVES: dict[str, Callable[..., Any]] = {
    "__and__": sympy.And, "bitwise_and": sympy.And, "logical_and": sympy.And, "__or__": sympy.Or,
    "bitwise_or": sympy.Or, "logical_or": sympy.Or, "logical_not": sympy.Not, "bitwise_not": sympy.Not,
}  # fmt: skip
ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
    "rsub": lambda a, b: b - a, "neg": lambda a: -a,
}  # fmt: skip
CONSTANTS = {"ones": 1, "zeros": 0, "new_ones": 1, "new_zeros": 0, "ones_like": 1, "zeros_like": 0}


def index(from_the_end: int) -> sympy.Symbol:
    """The index along a dim; 1 is the last."""
    return sympy.Symbol(f"i{from_the_end}", integer=True, nonnegative=True)


def is_truth(formula: object) -> bool:
    """Whether a formula is true or false at each index (to sympy, a symbol could be that too)."""
    return isinstance(formula, Boolean) and not isinstance(formula, sympy.Symbol)


def index_formulas(graph: fx.Graph) -> dict[fx.Node, Formula]:
    """The formula of every node of `graph` that has one."""
    found: dict[fx.Node, Formula] = {}
    for node in graph.nodes:
        if (
            node.op == "call_function"
            and isinstance(node.target, torch._ops.OpOverload)
            and tensor(node) is not None
        ):
            formula = _formula(node, found)
            if formula is not None:
                found[node] = _at_single_indices(node, formula)
    return found


def _at_single_indices(node: fx.Node, formula: Formula) -> Formula:
    """The index along a dim of one entry is 0."""
    shape = tensor(node).shape  # type: ignore[union-attr]
    single = {index(len(shape) - d): 0 for d, size in enumerate(shape) if isinstance(size, int) and size == 1}
    return formula.subs(single) if single else formula


def _formula(node: fx.Node, found: dict[fx.Node, Formula]) -> Formula | None:
    name = node.target._schema.name.split("::")[1]  # type: ignore[union-attr]
    if name in MAKERS:
        return MAKERS[name](node)
    if name in VIEWS:
        inner = found.get(node.args[0])  # type: ignore[arg-type]
        return VIEWS[name](node, inner) if inner is not None else None
    if name in CONSTANTS:
        return _constant(node, CONSTANTS[name])
    operands = [_operand(value, found) for value in node.args]
    if any(value is None for value in operands) or node.kwargs.get("alpha", 1) != 1:
        return TABLES[name](node, found) if name in TABLES else None
    if name in TABLES:
        return TABLES[name](node, found)
    return _pointwise(name, operands, tensor(node).dtype)  # type: ignore[union-attr]


def _operand(value: Any, found: dict[fx.Node, Formula]) -> Formula | None:
    if isinstance(value, fx.Node):
        return found.get(value)
    return _number(value) if isinstance(value, bool | int | float) else None


def _number(value: bool | int | float) -> Formula | None:
    if isinstance(value, bool):
        return sympy.true if value else sympy.false
    if value != value:
        return None
    if abs(value) == float("inf"):
        return sympy.oo if value > 0 else -sympy.oo
    return sympy.Integer(int(value)) if value == int(value) else sympy.Float(value)


# values made of nothing


def _constant(node: fx.Node, value: bool | int | float) -> Formula | None:
    return _number(bool(value) if tensor(node).dtype is torch.bool else value)  # type: ignore[union-attr]


def _full(node: fx.Node) -> Formula | None:
    value = argument(node, 1 if "new" not in str(node.target) else 2, "fill_value")
    return _constant(node, value) if isinstance(value, bool | int | float) else None


def _arange(node: fx.Node) -> Formula | None:
    ends = list(node.args)
    start = ends[0] if len(ends) > 1 else 0
    step = ends[2] if len(ends) > 2 else 1
    return start + step * index(1) if isinstance(start, int) and isinstance(step, int) else None


MAKERS: dict[str, Callable[[fx.Node], Formula | None]] = {
    "arange": _arange, "full": _full, "new_full": _full, "full_like": _full,
    "scalar_tensor": lambda node: _operand(node.args[0], {}),
}  # fmt: skip


# views


def _rank(value: Any) -> int:
    return tensor(value).dim()  # type: ignore[union-attr]


def _dims(node: fx.Node) -> list[Any]:
    """The dims a view names, after the value it looks at."""
    return list(node.args[1:])


def _renumbered(formula: Formula, numbers: dict[int, int]) -> Formula:
    return formula.subs({index(a): index(b) for a, b in numbers.items()}, simultaneous=True)


def _unsqueeze(node: fx.Node, inner: Formula) -> Formula:
    rank = _rank(node)
    new = rank - _dims(node)[0] % rank
    return _renumbered(inner, {k: k + 1 for k in range(new, rank)})


def _transpose(node: fx.Node, inner: Formula) -> Formula:
    rank = _rank(node)
    a, b = (rank - dim % rank for dim in _dims(node)[:2])
    return _renumbered(inner, {a: b, b: a})


def _slice(node: fx.Node, inner: Formula) -> Formula | None:
    rank = _rank(node)
    along = index(rank - int(argument(node, 1, "dim", 0)) % rank)
    start, step = argument(node, 2, "start") or 0, argument(node, 4, "step", 1)
    if not isinstance(start, int) or not isinstance(step, int) or start < 0:
        return None
    return inner.subs(along, start + step * along)


def _select(node: fx.Node, inner: Formula) -> Formula | None:
    rank, position = _rank(node.args[0]), node.args[2]
    along = rank - _dims(node)[0] % rank
    if not isinstance(position, int) or position < 0:
        return None
    at = inner.subs(index(along), position)
    return _renumbered(at, {k: k - 1 for k in range(along + 1, rank + 1)})


def _cast(node: fx.Node, inner: Formula) -> Formula | None:
    """Casts between numbers keep small whole numbers; to truth values, they are compared with zero."""
    before, after = tensor(node.args[0]).dtype, tensor(node).dtype  # type: ignore[union-attr]
    if after is torch.bool and before is not torch.bool:
        return _compare("ne", inner, sympy.Integer(0))
    if before is torch.bool and after is not torch.bool:
        return _choose(inner, sympy.Integer(1), sympy.Integer(0))
    return inner


def _triangle(node: fx.Node, inner: Formula) -> Formula | None:
    shift = argument(node, 1, "diagonal", 0)
    if not isinstance(shift, int):
        return None
    lower = node.target is aten.tril.default
    kept = index(1) <= index(2) + shift if lower else index(1) >= index(2) + shift
    zero = sympy.false if is_truth(inner) else sympy.Integer(0)
    return _choose(kept, inner, zero)


VIEWS: dict[str, Callable[[fx.Node, Formula], Formula | None]] = {
    "unsqueeze": _unsqueeze, "expand": lambda node, inner: inner, "transpose": _transpose, "slice": _slice,
    "select": _select, "to": _cast, "detach": lambda node, inner: inner, "tril": _triangle, "triu": _triangle,
    "cumsum": lambda node, inner: sympy.Integer(0) if inner in (0, sympy.false) else None,
}  # fmt: skip


# pointwise operators


def _pointwise(name: str, operands: list[Any], dtype: torch.dtype) -> Formula | None:
    if name in COMPARISONS and len(operands) == 2:
        return _compare(name, *operands)
    if name in CONNECTIVES and all(is_truth(value) for value in operands):
        return CONNECTIVES[name](*operands)
    if name == "where" and len(operands) == 3:
        return _choose(*operands)
    if name == "masked_fill":
        return _choose(operands[1], operands[2], operands[0])
    plain = all(isinstance(value, sympy.Expr) and value.is_polynomial() for value in operands)
    return ARITHMETIC[name](*operands) if name in ARITHMETIC and plain and len(operands) <= 2 else None


def _choose(shown: Any, yes: Any, no: Any) -> Formula | None:
    """`yes` where `shown`, else `no`: a truth value, or two numbers chosen by one."""
    if not is_truth(shown):
        return None
    if is_truth(yes) and is_truth(no):
        return sympy.Or(sympy.And(shown, yes), sympy.And(sympy.Not(shown), no))
    if shown in (sympy.true, sympy.false):
        return yes if shown == sympy.true else no
    if not all(isinstance(value, sympy.Expr) and value.is_number for value in (yes, no)):
        return None
    return sympy.Piecewise((yes, shown), (no, True))


def _compare(name: str, left: Any, right: Any) -> Formula | None:
    """A comparison; of chosen numbers, the condition under which it holds."""
    relation = COMPARISONS[name]
    if isinstance(left, sympy.Piecewise) and isinstance(right, sympy.Expr) and right.is_number:
        (yes, shown), (no, _) = left.args
        return _choose(shown, relation(yes, right), relation(no, right))
    if is_truth(left) or is_truth(right) or isinstance(right, sympy.Piecewise):
        return None
    return relation(left, right)


def _lookup(node: fx.Node, found: dict[fx.Node, Formula]) -> Formula | None:
    """`x[a, b]`, with an index for every dim: the formula of `x` at those of `a` and `b`."""
    source, at = node.args[:2]
    inner, rank = found.get(source), _rank(source)  # type: ignore[arg-type]
    formulas = [_operand(value, found) for value in at]  # type: ignore[union-attr]
    if inner is None or len(formulas) != rank or any(value is None for value in formulas):
        return None
    return inner.subs({index(rank - d): value for d, value in enumerate(formulas)}, simultaneous=True)


def _difference(node: fx.Node, found: dict[fx.Node, Formula]) -> Formula | None:
    """Neighbours of `a * i1 + b` differ by `a`, and so does the first from what was put before it: `b -
    a`."""
    inner, before = found.get(node.args[0]), found.get(argument(node, 3, "prepend"))  # type: ignore[arg-type]
    times, dim = argument(node, 1, "n", 1), argument(node, 2, "dim", -1)
    if (
        not isinstance(inner, sympy.Expr)
        or before is None
        or (times, dim) != (1, -1)
        or not inner.is_polynomial()
    ):
        return None
    slope = sympy.diff(inner, index(1))
    steady = not slope.free_symbols and argument(node, 4, "append") is None
    return slope if steady and before == inner.subs(index(1), 0) - slope else None


TABLES: dict[str, Callable[[fx.Node, dict[fx.Node, Formula]], Formula | None]] = {
    "index": _lookup, "diff": _difference,
}  # fmt: skip
