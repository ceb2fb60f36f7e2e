"""Where positions meet positions: attention, as one operator or written out.

New positions may be paired with all others where nothing of later ones remains: behind a mask and a
softmax, or times zero. What is said of later positions is followed through the operators
(`position_later.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import fx

from moec.ir.patterns import argument, tensor

from .position_axes import BATCH, HELD, HIDDEN, NEW, Axes, Read, Table
from .position_scope import Scope, rank_of

aten = torch.ops.aten

SOFTMAX = {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default}
PEAKS = {aten.amax.default, aten.logsumexp.default}  # of scores: hidden ones do not count
SUMS = {aten.sum.dim_IntList, aten.any.dim}  # of weights: zeros do not count
LATER_SEEN = "an attention that sees positions after its own"


def attention(scope: Scope, node: fx.Node) -> Axes:
    """`scaled_dot_product_attention`: keys and values are remembered."""
    query, key, value = node.args[:3]
    rank = rank_of(query)
    expected = {0: BATCH, rank - 2: NEW}
    if scope.axes(query).roles != expected:
        raise scope.refuse(node, "queries whose positions are not in their last dim but one")
    for operand, name in ((key, "keys"), (value, "values")):
        assert isinstance(operand, fx.Node)
        if scope.axes(operand).roles not in (expected, {0: BATCH, rank - 2: HELD}):
            raise scope.refuse(node, f"{name} whose positions are not in their last dim but one")
        if NEW in scope.axes(operand).roles.values():
            scope.remember(node, operand, name)
    _mask(scope, node, rank)
    return Axes(expected)


def _mask(scope: Scope, node: fx.Node, rank: int) -> None:
    mask = argument(node, 3, "attn_mask")
    if argument(node, 5, "is_causal", False) is True:
        square = ((rank - 2, NEW), (rank - 1, HELD))
        scope.labels.reads.append(Read(scope.name, node, None, -1, rank, square, scope.times(node)))
        return
    known = scope.known.get(mask) if isinstance(mask, fx.Node) else None
    if not isinstance(known, Axes | Table) or not hides(known, mask):
        raise scope.refuse(node, LATER_SEEN)
    if isinstance(known, Table):
        scope.read(node, mask, rank, {0: BATCH, rank - 2: NEW})


def hides(known: Axes | Table, mask: fx.Node) -> bool:
    """Whether a mask for `scaled_dot_product_attention` leaves nothing of later positions."""
    made = tensor(mask)
    if known.later is None or made is None:
        return False
    return known.later == 0 if made.dtype == torch.bool else known.later <= HIDDEN / 2


def product(scope: Scope, node: fx.Node) -> Axes:
    """Matrix products: queries times keys, weights times values, or of values of one position each."""
    left, right = node.args[:2]
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    rank = max(rank_of(left), rank_of(right))
    a, b = scope.aligned(left, rank), scope.aligned(right, rank)
    summed = a.pop(rank - 1, None), b.pop(rank - 2, None)
    if summed[0] == HELD and summed[1] in (NEW, HELD):
        _weighed(scope, node)
        _held(scope, node, right, "values")
    elif summed != (None, None):
        raise scope.refuse(node, "a product that sums over positions, outside an attention")
    elif a.get(rank - 2) == NEW and b.get(rank - 1) in (NEW, HELD):
        _held(scope, node, right, "keys")
        b[rank - 1] = HELD
    for operand, mine, others in ((left, a, b), (right, b, a)):
        if isinstance(scope.known.get(operand), Table):
            mine |= scope.read(node, operand, rank, others)
    return Axes(merged(scope, node, [a, b]))


def _held(scope: Scope, node: fx.Node, operand: fx.Node, name: str) -> None:
    if scope.axes(operand).dims(NEW):
        scope.remember(node, operand, name)


def _weighed(scope: Scope, node: fx.Node) -> None:
    if scope.axes(node.args[0]).later != 0:
        raise scope.refuse(node, "a sum over positions in which those after its own count")


def meet(scope: Scope, node: fx.Node, labelled: list[fx.Node], rank: int) -> list[dict[int, str]]:
    """The roles of values of tokens that are broadcast together to `rank` dims; one of new positions that
    meets held ones in the same dim is remembered."""
    roles = {value: scope.aligned(value, rank) for value in labelled}
    held = {dim for known in roles.values() for dim, role in known.items() if role == HELD}
    for value in labelled:
        if isinstance(scope.known[value], Axes) and any(roles[value].get(dim) == NEW for dim in held):
            scope.remember(node, value, "held")
    return [
        {dim: HELD if dim in held else role for dim, role in roles[value].items()}
        for value in labelled
        if isinstance(scope.known[value], Axes)
    ]


def along(scope: Scope, node: fx.Node, axes: Axes, dim: int) -> float | None:
    """What a reduction along the positions `dim` says of later ones; refused where they count in it."""
    held = axes.roles[dim] == HELD
    if held and node.target in SOFTMAX:
        if not axes.hides:
            raise scope.refuse(node, "a softmax that sees positions after its own")
        return 0.0
    if held and ((node.target in PEAKS and axes.hides) or (node.target in SUMS and axes.later == 0)):
        return None
    what = "rows of the batch" if axes.roles[dim] == BATCH else "positions"
    raise scope.refuse(node, f"{node.target} along the {what}")


def merged(scope: Scope, node: fx.Node, several: Iterable[Mapping[int, str]]) -> dict[int, str]:
    """The roles of values that are broadcast together; refused where positions or rows would be paired."""
    roles: dict[int, str] = {}
    for known in several:
        for dim, role in known.items():
            if roles.setdefault(dim, role) != role:
                raise scope.refuse(node, f"a dim that is '{roles[dim]}' in one value and '{role}' in another")
    names = list(roles.values())
    if names.count(NEW) > 1 or ("rows" in names and len(names) > 1):
        raise scope.refuse(node, "positions paired with each other, outside an attention")
    if names.count(BATCH) > 1:
        raise scope.refuse(node, "rows of the batch paired with each other")
    return roles
