"""Where the positions are: which dim of every value runs over positions, and what reads other positions.

Walks a program from its tokens and gives every value that depends on them its *axes*: dim → role, where a role
is `new` (the positions a step is fed), `held` (those a cache holds) or `rows` (batch and new positions in one
dim). Attention pairs new positions with held ones, so its keys and values must be remembered: they become
*sites*. Position-only values meet the tokens' values in *reads*. Everything else must keep positions apart; an
operator that does not, or that is not known to, is refused by name.

Operators that only move numbers (views, slices, concatenations) are understood by moving position numbers with
them and looking where these end up, not by how they are spelled.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from moec.errors import PassError
from moec.ir import region_of
from moec.ir.dependence import READS_SHAPE_ONLY
from moec.ir.graphs import output, placeholder
from moec.ir.patterns import argument, is_call, tensor

from .position_moves import HELD, MOVES, NEW, Sequence, hint

aten = torch.ops.aten

ATTENTION = aten.scaled_dot_product_attention.default
PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.mm.default}
SOFTMAX = {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default}
# Reduce or scan along the dims of their second argument, and keep all others apart.
ALONG = {
    aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.var.correction,
    aten.var.dim, aten.std.correction, aten.std.dim, aten.linalg_vector_norm.default, aten.any.dim, aten.all.dim,
    aten.logsumexp.default, aten.prod.dim_int, aten.cumsum.default, aten.sort.default, aten.topk.default,
    aten.log_softmax.int, aten.argmax.default, aten.argmin.default,
}  # fmt: skip
# Act on the last dims of their first argument only: how many, by the length of the second (or one).
LAST_DIMS = {
    aten.linear.default, aten.layer_norm.default, aten.rms_norm.default, aten.view_as_complex.default,
    aten.view_as_real.default, aten.glu.default,
}  # fmt: skip
POINTWISE = {
    aten.dropout.default,
    aten.to.dtype,
    aten._to_copy.default,
    aten.to.device,
    aten.softplus.default,
}
# Regions that act on rows by construction: what has the shape of their input has its positions.
ROW_REGIONS = ("moe", "dispatch")
NOTHING = -1e4  # a score below this leaves nothing of a position after the softmax


@dataclass(frozen=True)
class Axes:
    """A value that depends on tokens: `roles` dim → role; `hides`: scores whose later positions are hidden."""

    roles: Mapping[int, str] = field(default_factory=dict)
    hides: bool = False

    def dims(self, role: str) -> list[int]:
        """The dims with this role."""
        return [dim for dim, has in self.roles.items() if has == role]


@dataclass(frozen=True)
class Table:
    """A value that depends on positions only: result `index` of the positions region, `rank` dims, those in
    `dims` run over positions."""

    index: int
    rank: int
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Read:
    """`user` (a node of the region `region`, or of the root: '') reads table `index`, broadcast to `rank` dims,
    whose dims `roles` run over positions. `scores`: added to the scores of an attention, nothing else. A table
    of -1 is the plain causal mask."""

    region: str
    user: fx.Node
    value: fx.Node | None
    index: int
    rank: int
    roles: tuple[tuple[int, str], ...]
    scores: bool = False


@dataclass(frozen=True)
class Site:
    """`user` (in `region`) must read `value` at all held positions, which are at `dim`; `name`: of the cache."""

    region: str
    user: fx.Node
    value: fx.Node
    dim: int
    name: str


@dataclass
class Labels:
    """What the walk found."""

    sites: list[Site] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    hiding: frozenset[int] = frozenset()

    def refuse(self, where: str, found: str, needed: str = "") -> PassError:
        """The error of a program that cannot be cached."""
        usual = "attention over earlier positions; all else position by position"
        return PassError(f"derive_cache: {where}", found, needed or usual, "program(tokens) recomputes")


def label_positions(root: fx.GraphModule, hiding: frozenset[int]) -> Labels:
    """Label every value of `root`. `hiding`: the results of the positions region that are masks which hide all
    later positions. Raises `PassError`, naming the operator, where positions mix."""
    tokens = placeholder(root.graph)
    labels = Labels(hiding=hiding)
    walk = _Walk(labels, Sequence(tokens), root, root, "")
    walk.env[tokens] = Axes({1: NEW})
    (logits,) = walk.run()[:1]
    if not isinstance(logits, Axes) or logits.roles != {1: NEW}:
        raise labels.refuse("the logits", "logits whose dim 1 is not the positions", "logits [B, S, V]")
    return labels


class _Walk:
    """Labels of one graph: the root, or a region called from it."""

    def __init__(
        self, labels: Labels, sequence: Sequence, root: fx.GraphModule, module: fx.GraphModule, name: str
    ) -> None:
        self.labels, self.sequence = labels, sequence
        self.root, self.module, self.name = root, module, name
        self.env: dict[fx.Node, Any] = {}

    def run(self) -> list[Any]:
        """Label all nodes; the labels of what the graph returns."""
        for node in self.module.graph.nodes:
            if node.op == "call_module":
                self.env[node] = self._region(node)
            elif node.op == "call_function":
                self.env[node] = self._call(node)
        returned = output(self.module.graph).args[0]
        first = returned if isinstance(returned, tuple | list) else (returned,)
        return [self.env.get(value) if isinstance(value, fx.Node) else None for value in first]

    def _where(self, node: fx.Node) -> str:
        source = node.meta.get("source") or node.meta.get("path") or ""
        return f"{self.name or 'root'}: {node.name}" + (f" ({source})" if source else "")

    def _refuse(self, node: fx.Node, found: str) -> PassError:
        return self.labels.refuse(self._where(node), found)

    # regions

    def _region(self, node: fx.Node) -> Any:
        module = self.root.get_submodule(str(node.target))
        region = region_of(module)
        assert isinstance(module, fx.GraphModule) and region is not None
        if region.kind == "positions":
            return self._tables(output(module.graph).args[0])
        if region.kind in ROW_REGIONS:
            return self._rows(node)
        inner = _Walk(self.labels, self.sequence, self.root, module, str(node.target))
        places = [n for n in module.graph.nodes if n.op == "placeholder"]
        for place, value in zip(places, node.args, strict=True):
            if isinstance(value, fx.Node) and self.env.get(value) is not None:
                inner.env[place] = self.env[value]
        found = inner.run()
        several = isinstance(output(module.graph).args[0], tuple | list)
        return found if several else found[0]

    def _tables(self, returned: Any) -> Any:
        several = isinstance(returned, tuple | list)
        made = [self._table(i, node) for i, node in enumerate(returned if several else [returned])]
        return made if several else made[0]

    def _table(self, index: int, node: Any) -> Table | None:
        value = tensor(node)
        return None if value is None else Table(index, value.dim(), tuple(self.sequence.dims(value)))

    def _rows(self, node: fx.Node) -> Any:
        """Of a region that acts on rows: results of the shape of its first input have its positions."""
        given = node.args[0]
        assert isinstance(given, fx.Node)
        axes, like, values = self.env.get(given), tensor(given), node.meta["val"]
        if not isinstance(axes, Axes) or like is None:
            raise self._refuse(node, "an expert layer that does not read one value for each position")

        def label(value: Any) -> Any:
            same = isinstance(value, Tensor) and list(map(str, value.shape)) == list(map(str, like.shape))
            return axes if same else Axes()

        return [label(v) for v in values] if isinstance(values, tuple | list) else label(values)

    # operators

    def _call(self, node: fx.Node) -> Any:
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            held = self.env.get(node.args[0])
            return held[node.args[1]] if isinstance(held, list) else None
        if node.target in READS_SHAPE_ONLY:
            return self._shaped(node)
        labelled = [n for n in node.all_input_nodes if isinstance(self.env.get(n), Axes | Table)]
        if not labelled:
            return None if not self.sequence.dims(tensor(node)) else self._misplaced(node)
        return self._rule(node, labelled)

    def _shaped(self, node: fx.Node) -> Any:
        """A value made from a shape: positions are where the sequence is."""
        dims = self.sequence.dims(tensor(node))
        if len(dims) > 1:
            raise self._refuse(node, "a value over pairs of positions that is made inside a region")
        return Axes({dims[0]: NEW}) if dims else None

    def _misplaced(self, node: fx.Node) -> Any:
        raise self._refuse(node, "a value of positions that is made outside the positions region")

    def _rule(self, node: fx.Node, labelled: list[fx.Node]) -> Any:
        target = node.target
        tags = getattr(target, "tags", ())
        if target is ATTENTION:
            return self._attention(node)
        if target in MOVES:
            return self._move(node)
        if target in PRODUCTS:
            return self._product(node)
        if target in SOFTMAX or target in ALONG:
            return self._along(node)
        if target in LAST_DIMS:
            return self._last_dims(node)
        if target is aten.embedding.default:
            return self._looked_up(node)
        if target in POINTWISE or torch.Tag.pointwise in tags:
            return self._pointwise(node, labelled)
        if getattr(target, "namespace", "") in ("_c10d_functional", "moec"):
            return self._between_ranks(node)
        raise self._refuse(node, f"{target}, which is not known to keep positions apart")

    def _axes(self, node: Any) -> Axes:
        found = self.env.get(node) if isinstance(node, fx.Node) else None
        if isinstance(found, Table):
            raise self._refuse(node, "a table of positions where only values of tokens are understood")
        return found if isinstance(found, Axes) else Axes()

    def _pointwise(self, node: fx.Node, labelled: list[fx.Node]) -> Axes:
        made = tensor(node)
        assert made is not None
        rank = made.dim()
        self._meet(node, labelled, rank)
        roles: dict[int, str] = {}
        hides = False
        for value in labelled:
            known = self.env[value]
            if isinstance(known, Axes):
                roles |= {dim + rank - _rank(value): role for dim, role in known.roles.items()}
                hides |= known.hides
        for value in labelled:
            known = self.env[value]
            if isinstance(known, Table):
                read = self._read(node, value, known, rank, roles)
                roles |= dict(read.roles)
                hides |= known.index in self.labels.hiding
        if len([1 for role in roles.values() if role == NEW]) > 1:
            raise self._refuse(node, "positions paired with each other, outside an attention")
        return Axes(roles, hides)

    def _meet(self, node: fx.Node, labelled: list[fx.Node], rank: int) -> None:
        """A value of new positions that meets held ones in the same dim has to be remembered."""
        held = set[int]()
        for value in labelled:
            known = self.env[value]
            if isinstance(known, Axes):
                held |= {dim + rank - _rank(value) for dim in known.dims(HELD)}
            elif len(known.dims) == 2:
                held.add(known.dims[1] + rank - known.rank)
        for value in labelled:
            known = self.env[value]
            if isinstance(known, Axes) and any(d + rank - _rank(value) in held for d in known.dims(NEW)):
                self._remember(node, value, "held")

    def _read(self, node: fx.Node, value: fx.Node, table: Table, rank: int, roles: Mapping[int, str]) -> Read:
        dims = [dim + rank - table.rank for dim in table.dims]
        if len(dims) == 2:
            given = (NEW, HELD)
        elif len(dims) < 2:
            given = tuple(roles.get(dim, NEW) for dim in dims)  # type: ignore[assignment]
        else:
            raise self._refuse(node, "a table over more than two positions")
        read = Read(self.name, node, value, table.index, rank, tuple(zip(dims, given, strict=True)))
        self.labels.reads.append(read)
        return read

    def _attention(self, node: fx.Node) -> Axes:
        query, key, value = node.args[:3]
        rank = _rank(query)
        if self._axes(query).roles != {rank - 2: NEW}:
            raise self._refuse(node, "queries whose positions are not in their last dim but one")
        for operand, name in ((key, "keys"), (value, "values")):
            assert isinstance(operand, fx.Node)
            if self._axes(operand).roles != {rank - 2: NEW}:
                raise self._refuse(node, f"{name} whose positions are not in their last dim but one")
            self._remember(node, operand, name)
        self._mask(node, rank)
        return Axes({rank - 2: NEW})

    def _mask(self, node: fx.Node, rank: int) -> None:
        mask = argument(node, 3, "attn_mask")
        square = ((rank - 2, NEW), (rank - 1, HELD))
        if argument(node, 5, "is_causal", False) is True:
            self.labels.reads.append(Read(self.name, node, None, -1, rank, square, scores=True))
            return
        known = self.env.get(mask) if isinstance(mask, fx.Node) else None
        if isinstance(known, Table) and known.index in self.labels.hiding:
            self.labels.reads.append(Read(self.name, node, mask, known.index, rank, square, scores=True))
        elif not isinstance(known, Axes) or not known.hides:
            raise self._refuse(node, "an attention that sees positions after its own")

    def _product(self, node: fx.Node) -> Axes:
        left, right = node.args[:2]
        a, b = self._axes(left), self._axes(right)
        rank = max(_rank(left), _rank(right))
        left_last, right_inner = a.roles.get(_rank(left) - 1), b.roles.get(_rank(right) - 2)
        assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
        if left_last == HELD and right_inner == NEW:
            self._remember(node, right, "values")
        elif left_last is not None or right_inner is not None:
            raise self._refuse(node, "a product that sums over positions, outside an attention")
        elif a.roles.get(_rank(left) - 2) == NEW and b.roles.get(_rank(right) - 1) == NEW:
            self._remember(node, right, "keys")
            return Axes({rank - 2: NEW, rank - 1: HELD})
        outer = {dim + rank - _rank(left): role for dim, role in a.roles.items() if dim != _rank(left) - 1}
        outer |= {dim + rank - _rank(right): r for dim, r in b.roles.items() if dim != _rank(right) - 2}
        if list(outer.values()).count(NEW) > 1 or (b.roles and left_last is None):
            raise self._refuse(node, "a product of two values of positions that is not an attention")
        return Axes(outer)

    def _along(self, node: fx.Node) -> Any:
        given = node.args[0]
        axes, rank = self._axes(given), _rank(given)
        dims = argument(node, 2 if node.target is aten.topk.default else 1, "dim", -1)
        chosen = (
            {d % rank for d in (dims if isinstance(dims, list | tuple) else (dims,))}
            if dims is not None
            else set(range(rank))
        )
        for dim in chosen & set(axes.roles):
            softmax = node.target in SOFTMAX and axes.roles[dim] == HELD
            if not softmax:
                raise self._refuse(node, f"{node.target} along the positions")
            if not axes.hides:
                raise self._refuse(node, "a softmax that sees positions after its own")
        values = node.meta["val"]
        if isinstance(values, tuple | list):
            return [Axes(_without(axes.roles, chosen, rank, value.dim())) for value in values]
        return Axes(_without(axes.roles, chosen, rank, values.dim()))

    def _last_dims(self, node: fx.Node) -> Axes:
        given = node.args[0]
        axes, sizes = self._axes(given), node.args[1] if len(node.args) > 1 else ()
        count = len(sizes) if isinstance(sizes, list | tuple) else 1
        count = 0 if node.target is aten.view_as_real.default else max(count, 1)
        if any(dim >= _rank(given) - count for dim in axes.roles):
            raise self._refuse(node, f"{node.target} along the positions")
        others = [n for n in node.all_input_nodes if n is not given and self.env.get(n) is not None]
        if others:
            raise self._refuse(node, f"{node.target} with weights that depend on tokens")
        return Axes(axes.roles)

    def _looked_up(self, node: fx.Node) -> Axes:
        return Axes(self._axes(node.args[1]).roles)

    def _between_ranks(self, node: fx.Node) -> Any:
        """Exchanges add or gather what other ranks have of the same positions."""
        given = next(n for n in node.all_input_nodes if isinstance(self.env.get(n), Axes))
        same, value = tensor(given), tensor(node)
        if same is None or value is None:
            return Axes()
        kept = {d: r for d, r in self._axes(given).roles.items() if d < value.dim()}
        alike = all(str(value.shape[d]) == str(same.shape[d]) for d in kept) and value.dim() == same.dim()
        return Axes(kept if alike else {dim: NEW for dim in self.sequence.dims(value)})

    def _move(self, node: fx.Node) -> Any:
        roles = {n: self._axes(n).roles for n in node.all_input_nodes if tensor(n) is not None}
        try:
            made = [Axes(found) for found in self.sequence.moved(node, roles)]
        except ValueError as error:
            raise self._refuse(node, str(error)) from None
        return made if isinstance(node.meta["val"], tuple | list) else made[0]

    # what is remembered

    def _remember(self, user: fx.Node, value: fx.Node, name: str) -> None:
        """`user` shall read `value` at all held positions; it is remembered where it is smallest."""
        best, reader = value, user
        step, last = value, user
        while (source := self._source(step)) is not None:
            last, step = step, source
            if _width(step) < _width(best):
                best, reader = step, last
        (dim,) = self._axes(best).dims(NEW)
        site = Site(self.name, reader, best, dim, name)
        if site not in self.labels.sites:
            self.labels.sites.append(site)
        node = value
        while node is not best:
            self.env[node] = Axes({d: HELD if r == NEW else r for d, r in self._axes(node).roles.items()})
            node = node.args[0]  # type: ignore[assignment]

    def _source(self, node: fx.Node) -> fx.Node | None:
        """What `node` merely moves, where that could be remembered in its place."""
        if not is_call(node, *MOVES) or len(node.users) > 1 or len(node.all_input_nodes) != 1:
            return None
        source = node.all_input_nodes[0]
        known = self.env.get(source)
        alone = isinstance(known, Axes) and list(known.roles.values()) == [NEW] and source is node.args[0]
        return source if alone and tensor(source) is not None else None


def _rank(node: Any) -> int:
    value = tensor(node)
    assert value is not None
    return value.dim()


def _width(node: fx.Node) -> int:
    """Numbers of a value for each row and position (and batch and sequence of the sample sizes)."""
    value = tensor(node)
    assert value is not None
    total = 1
    for size in value.shape:
        total *= hint(size)
    return total


def _without(roles: Mapping[int, str], dims: Iterable[int], rank: int, left: int) -> dict[int, str]:
    """`roles` after the dims `dims` were reduced, where the result has `left` dims."""
    dims = set(dims)
    if left == rank:
        return dict(roles)
    return {dim - sum(1 for d in dims if d < dim): role for dim, role in roles.items() if dim not in dims}
