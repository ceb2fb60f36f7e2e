"""Spell attention written out (product, scale, mask, softmax, product) as `scaled_dot_product_attention`.

before:  s = matmul(q, transpose(k, -2, -1)) / 8.0 + mask;   y = matmul(dropout(softmax(s, -1), p), v)
after:   y = scaled_dot_product_attention(q, k, v, mask, p, scale=0.125)

Assumes: nothing but scaling and masking stands between product and softmax (a soft cap is left as it is),
and no row is masked completely.
Contract: exact.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from moec.ir import Pass, Program
from moec.ir.graphs import drop_unused
from moec.ir.identity import made_from
from moec.ir.patterns import CASTS, call, for_each, is_call, only_user, replace, tensor, uncast

aten = torch.ops.aten
PRODUCTS = (aten.matmul.default, aten.bmm.default)

# A mask value below this leaves exactly nothing of a position after the softmax, in every floating dtype.
NOTHING = -1e4


@dataclass(frozen=True)
class SpellAttention(Pass):
    """See the module."""

    def apply(self, program: Program) -> Program:
        for_each(program.graph.graph, _rewrite)
        for_each(program.graph.graph, _drop_usual_scale)
        drop_unused(program.graph)
        return program


@dataclass
class _Scores:
    """What is known of the scores while reading them backwards from the softmax."""

    scale: float = 1.0
    masks: list[Any] = field(default_factory=list)
    query: Any = None
    key: Any = None


def _rewrite(node: fx.Node) -> None:
    if not is_call(node, *PRODUCTS):
        return
    softmax, dropout = _probabilities(node.args[0])
    if softmax is None or softmax.args[1] not in (-1, tensor(softmax).dim() - 1):  # type: ignore[union-attr]
        return
    scores = _Scores()
    if not _read(softmax.args[0], scores, softmax):
        return
    values: tuple[Any, Any, Any] = (scores.query, scores.key, node.args[1])
    q, k, v = values
    if any(value is None or tensor(value) is None or tensor(value).dim() < 3 for value in (q, k, v)):  # type: ignore[union-attr]
        return
    q, k, v = (_in_dtype(node, value, tensor(v)) for value in (q, k, v))
    mask = _combined(node, scores.masks, tensor(v))
    made = call(node, aten.scaled_dot_product_attention.default, (q, k, v, mask), _scale(q, scores.scale))
    if dropout is not None:
        made.args = (*made.args, _probability(made, dropout))
    replace(node, made)


def _drop_usual_scale(node: fx.Node) -> None:
    """Nothing is said of a scale that is the usual one."""
    if is_call(node, aten.scaled_dot_product_attention.default) and isinstance(
        node.kwargs.get("scale"), float
    ):
        rest = {name: value for name, value in node.kwargs.items() if name != "scale"}
        node.kwargs = rest | _scale(node.args[0], node.kwargs["scale"])  # type: ignore[arg-type]


def _scale(query: fx.Node, scale: float) -> dict[str, float]:
    """The scale, where it is not the one attention uses by itself: one over the root of the head's width."""
    usual = 1.0 / math.sqrt(int(tensor(query).shape[-1]))  # type: ignore[union-attr]
    return {} if math.isclose(scale, usual, rel_tol=1e-14) else {"scale": scale}


def _in_dtype(before: fx.Node, value: fx.Node, like: Any) -> fx.Node:
    """Scores computed in fp32 from narrower queries and keys: attention widens inside, so take the narrow
    ones."""
    bare = uncast(value)
    if tensor(bare).dtype == like.dtype:  # type: ignore[union-attr]
        return bare
    return value if tensor(value).dtype == like.dtype else call(before, aten.to.dtype, (value, like.dtype))  # type: ignore[union-attr]


def _probabilities(value: Any) -> tuple[fx.Node | None, fx.Node | None]:
    """The softmax behind `value`, and the dropout between the two, through casts."""
    dropout = None
    while is_call(value, *CASTS, aten.dropout.default) and only_user(value) is not None:
        dropout = value if value.target is aten.dropout.default else dropout
        value = value.args[0]
    found = is_call(value, aten.softmax.int) and only_user(value) is not None
    return (value, dropout) if found else (None, None)


def _probability(before: fx.Node, dropout: fx.Node) -> fx.Node:
    """The `dropout_p` of attention for `dropout(x, p, training)`: training * p."""
    with before.graph.inserting_before(before):
        made = before.graph.call_function(operator.mul, (dropout.args[2], dropout.args[1]))
    return made_from(made, dropout, taking=())


def _read(value: Any, scores: _Scores, user: fx.Node) -> bool:
    """Read one operator of the score expression into `scores`; False when it is something else."""
    if not isinstance(value, fx.Node) or only_user(value) is not user:
        return False
    if is_call(value, *CASTS):
        return _read(value.args[0], scores, value)
    if is_call(value, *PRODUCTS):
        return _read_product(value, scores)
    if is_call(value, aten.mul.Tensor, aten.div.Tensor) and isinstance(value.args[1], (int, float)):
        factor = float(value.args[1])
        scores.scale *= factor if value.target is aten.mul.Tensor else 1.0 / factor
        return _read(value.args[0], scores, value)
    return _read_mask(value, scores)


def _read_product(value: fx.Node, scores: _Scores) -> bool:
    key = value.args[1]
    if not is_call(uncast(key), aten.transpose.int):  # type: ignore[arg-type]
        return _read_permuted(value, scores)
    turned = uncast(key)  # type: ignore[arg-type]
    rank = tensor(turned).dim()  # type: ignore[union-attr]
    swapped: list[Any] = list(turned.args[1:3])
    if {dim % rank for dim in swapped} != {rank - 1, rank - 2}:
        return False
    scores.query, scores.key = value.args[0], turned.args[0]
    return True


def _read_permuted(value: fx.Node, scores: _Scores) -> bool:
    """A key that was laid out [.., d, S] in the first place is turned back."""
    key = value.args[1]
    if not isinstance(key, fx.Node) or tensor(key) is None:
        return False
    scores.query, scores.key = value.args[0], call(value, aten.transpose.int, (key, -2, -1))
    return True


def _read_mask(value: fx.Node, scores: _Scores) -> bool:
    """`s + mask`, `masked_fill(s, hidden, -inf)`, `where(shown, s, -inf)`; scaling before it must not touch
    the mask."""
    if is_call(value, aten.add.Tensor) and all(isinstance(a, fx.Node) for a in value.args[:2]):
        for inner, mask in (value.args[:2], value.args[1::-1]):
            if _leads_to_product(inner):
                scores.masks.append(("add", mask, scores.scale))
                return _read(inner, scores, value)
        return False
    if is_call(value, aten.masked_fill.Scalar) and _hides(value.args[2]):
        scores.masks.append(("hide", value.args[1], 1.0))
        return _read(value.args[0], scores, value)
    if is_call(value, aten.where.ScalarOther) and _hides(value.args[2]):
        scores.masks.append(("show", value.args[0], 1.0))
        return _read(value.args[1], scores, value)
    return _read_where(value, scores)


def _read_where(value: fx.Node, scores: _Scores) -> bool:
    """`where(shown, s, full([], -big))`, the hidden value given as a tensor of one number."""
    if not is_call(value, aten.where.self) or not is_call(value.args[2], aten.full.default):
        return False
    if not _hides(value.args[2].args[1]):  # type: ignore[union-attr]
        return False
    scores.masks.append(("show", value.args[0], 1.0))
    return _read(value.args[1], scores, value)


def _hides(value: Any) -> bool:
    return isinstance(value, (int, float)) and value <= NOTHING


def _leads_to_product(value: Any) -> bool:
    while is_call(value, *CASTS, aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.masked_fill.Scalar):
        value = value.args[0]
    return is_call(value, *PRODUCTS)


def _combined(before: fx.Node, masks: list[Any], like: Any) -> Any:
    """One mask for attention: none, a boolean one, or the sum of all as numbers."""
    if not masks:
        return None
    if len(masks) == 1 and masks[0][0] != "add":
        kind, mask, _ = masks[0]
        return mask if kind == "show" else call(before, aten.logical_not.default, (mask,))
    total = None
    for kind, mask, factor in reversed(masks):
        number = _as_number(before, kind, mask, factor, like)
        total = number if total is None else call(before, aten.add.Tensor, (total, number))
    return total


def _as_number(before: fx.Node, kind: str, mask: Any, factor: float, like: Any) -> Any:
    if kind == "add":
        scaled = mask if factor == 1.0 else call(before, aten.mul.Tensor, (mask, factor))
        return _cast(before, scaled, like)
    shown, hidden = (0.0, float("-inf")) if kind == "show" else (float("-inf"), 0.0)
    number = call(before, aten.where.Scalar, (mask, shown, hidden))
    return _cast(before, number, like)


def _cast(before: fx.Node, value: fx.Node, like: Any) -> fx.Node:
    known = tensor(value)
    same = known is not None and known.dtype == like.dtype
    return value if same else call(before, aten.to.dtype, (value, like.dtype))
