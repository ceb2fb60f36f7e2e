"""What each operator does to positions: keeps them apart, moves them, pairs them, or is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from moec.ir.patterns import argument, is_call, tensor

from .position_axes import HELD, NEW, Axes, Roles, Table
from .position_later import later_of
from .position_moves import MOVES
from .position_pairs import PEAKS, SOFTMAX, SUMS, along, attention, meet, merged, product
from .position_scope import Scope, rank_of

aten = torch.ops.aten
Rule = Callable[[Scope, fx.Node], Any]

# Reduce or scan along the dims of their second argument, and keep all others apart.
ALONG = {
    aten.mean.dim, aten.amin.default, aten.var.correction, aten.var.dim, aten.std.correction, aten.std.dim,
    aten.linalg_vector_norm.default, aten.all.dim, aten.prod.dim_int, aten.cumsum.default,
    aten.sort.default, aten.topk.default, aten.log_softmax.int, aten.argmax.default, aten.argmin.default,
    *SOFTMAX, *PEAKS, *SUMS,
}  # fmt: skip
# Act on the last dims of their first argument only: how many, by the length of the second (or one).
LAST_DIMS = {
    aten.linear.default, aten.layer_norm.default, aten.rms_norm.default, aten.view_as_complex.default,
    aten.view_as_real.default, aten.glu.default,
}  # fmt: skip
# Pointwise, though not all are marked so.
POINTWISE = {
    aten.dropout.default, aten.to.dtype, aten._to_copy.default, aten.to.device, aten.softplus.default,
    aten.__and__.Tensor, aten.__or__.Tensor, aten.__xor__.Tensor, aten.__and__.Scalar,
    aten.__or__.Scalar, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar, aten.where.self,
}  # fmt: skip


def rule_of(target: Any) -> Rule | None:
    """What is known of an operator; None when it may mix positions."""
    for targets, rule in RULES:
        if target in targets:
            return rule
    if torch.Tag.pointwise in getattr(target, "tags", ()):
        return pointwise
    return between_ranks if getattr(target, "namespace", "") in ("_c10d_functional", "moec") else None


def pointwise(scope: Scope, node: fx.Node) -> Axes:
    """Number by number: dims that are broadcast together have one role."""
    labelled = [n for n in node.all_input_nodes if isinstance(scope.known.get(n), Axes | Table)]
    rank = rank_of(node)
    roles = merged(scope, node, meet(scope, node, labelled, rank))
    for value in labelled:
        if isinstance(scope.known[value], Table):
            roles = merged(scope, node, [roles, scope.read(node, value, rank, roles)])
    paired = NEW in roles.values() and HELD in roles.values()
    return Axes(roles, later_of(scope, node) if paired else None)


def reduced(scope: Scope, node: fx.Node) -> Any:
    """Along some dims: fine where these are not positions."""
    given = node.args[0]
    axes, rank = scope.axes(given), rank_of(given)
    chosen, later = _reduced_dims(node, rank), axes.later
    for dim in chosen & set(axes.roles):
        later = along(scope, node, axes, dim)
    values = node.meta["val"]
    made = [
        Axes(_without(axes.roles, chosen, rank, value.dim()), later if node.target in SOFTMAX else None)
        for value in (values if isinstance(values, tuple | list) else [values])
    ]
    return made if isinstance(values, tuple | list) else made[0]


def _reduced_dims(node: fx.Node, rank: int) -> set[int]:
    dims = argument(node, 2 if node.target is aten.topk.default else 1, "dim", -1)
    listed = list(dims) if isinstance(dims, list | tuple) else [] if dims is None else [dims]
    return {dim % rank for dim in listed} if listed else set(range(rank))


def _without(roles: Roles, dims: Iterable[int], rank: int, left: int) -> dict[int, str]:
    """`roles` after the dims `dims` were reduced, where the result has `left` dims."""
    dims = set(dims)
    if left == rank:
        return dict(roles)
    return {dim - sum(1 for d in dims if d < dim): role for dim, role in roles.items() if dim not in dims}


def last_dims(scope: Scope, node: fx.Node) -> Axes:
    """Products with weights and norms: they see nothing but the last dims."""
    given = node.args[0]
    axes, sizes = scope.axes(given), node.args[1] if len(node.args) > 1 else ()
    count = len(sizes) if isinstance(sizes, list | tuple) else 1
    count = 0 if node.target is aten.view_as_real.default else max(count, 1)
    if any(dim >= rank_of(given) - count for dim in axes.roles):
        raise scope.refuse(node, f"{node.target} along the positions")
    if any(scope.known.get(n) is not None for n in node.all_input_nodes if n is not given):
        raise scope.refuse(node, f"{node.target} with weights that depend on tokens or positions")
    return Axes(axes.roles)


def looked_up(scope: Scope, node: fx.Node) -> Axes:
    """An embedding of tokens."""
    if isinstance(node.args[0], fx.Node) and scope.known.get(node.args[0]) is not None:
        raise scope.refuse(node, "a lookup in what depends on tokens or positions")
    return Axes(scope.axes(node.args[1]).roles)


def moved(scope: Scope, node: fx.Node) -> Any:
    """Views, slices, concatenations: by looking where position numbers end up."""
    sources = [n for n in node.all_input_nodes if tensor(n) is not None]
    try:
        found = scope.sequence.moved(node, {n: scope.axes(n).roles for n in sources})
    except ValueError as error:
        raise scope.refuse(node, str(error)) from None
    later = scope.axes(sources[0]).later if len(sources) == 1 else None
    made = [Axes(roles, later) for roles in found]
    return made if isinstance(node.meta["val"], tuple | list) else made[0]


def between_ranks(scope: Scope, node: fx.Node) -> Any:
    """Exchanges add or gather what other ranks have of the same positions."""
    if is_call(node, torch.ops.moec.part.default):
        return part_of(scope, node)
    given = next(n for n in node.all_input_nodes if isinstance(scope.known.get(n), Axes))
    same, value = tensor(given), tensor(node)
    if same is None or value is None:
        return Axes()
    kept = {d: r for d, r in scope.axes(given).roles.items() if d < value.dim()}
    alike = all(str(value.shape[d]) == str(same.shape[d]) for d in kept) and value.dim() == same.dim()
    return Axes(kept if alike else scope.sequence.by_size(value))


def part_of(scope: Scope, node: fx.Node) -> Axes | Table:
    """A rank's part of what all ranks hold: of a table, whoever reads it looks up the whole and takes its
    part then."""
    known = scope.known[node.args[0]]  # type: ignore[index]
    dim = node.args[1] % rank_of(node)  # type: ignore[operator]
    if dim in (known.dims if isinstance(known, Table) else known.roles):
        raise scope.refuse(node, "a part of the positions")
    assert isinstance(known, Axes | Table)
    return known


RULES: tuple[tuple[set[Any], Rule], ...] = (
    ({aten.scaled_dot_product_attention.default}, attention),
    ({aten.matmul.default, aten.bmm.default, aten.mm.default}, product),
    (MOVES, moved),
    (ALONG, reduced),
    (LAST_DIMS, last_dims),
    ({aten.embedding.default}, looked_up),
    (POINTWISE, pointwise),
)
