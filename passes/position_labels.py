"""Where the positions are: which dim of every value runs over positions, and what reads other positions.

Walks a program from its tokens and gives every value that depends on them its *axes*: dim → role
(`position_axes.py`). Attention pairs new positions with held ones, so its keys and values must be remembered:
they become *sites*. Position-only values meet the tokens' values in *reads*. Everything else must keep
positions apart, and rows of the batch; an operator that does not, or that is not known to, is refused by
name (`position_rules.py`).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from moec.ir import region_of
from moec.ir.dependence import READS_SHAPE_ONLY
from moec.ir.graphs import output, placeholder
from moec.ir.patterns import tensor

from .position_axes import BATCH, NEW, Axes, Labels, Table, refusal
from .position_moves import Sequence
from .position_rules import rule_of
from .position_scope import Scope

# Regions that act on rows by construction: what has the shape of their input has its positions.
ROW_REGIONS = ("moe", "dispatch")


def label_positions(root: fx.GraphModule, later: Mapping[int, float]) -> Labels:
    """Label every value of `root`. `later`: result of the positions region → its number at later positions,
    for masks. Raises `PassError`, naming the operator, where positions mix."""
    tokens = placeholder(root.graph)
    walk = _Walk(root, Sequence(tokens), later)
    scope = walk.scope(root, "")
    scope.known[tokens] = Axes({0: BATCH, 1: NEW})
    logits = walk.run(scope)[0]
    if not isinstance(logits, Axes) or logits.roles != {0: BATCH, 1: NEW}:
        raise refusal("the logits", "logits whose dim 1 is not the positions", "logits [B, S, V]")
    return walk.labels


class _Walk:
    """Goes through the root and, at each call, through the region that is called."""

    def __init__(self, root: fx.GraphModule, sequence: Sequence, later: Mapping[int, float]) -> None:
        self.root, self.sequence, self.later = root, sequence, later
        self.labels = Labels()

    def scope(self, module: fx.GraphModule, name: str) -> Scope:
        return Scope(self.labels, self.sequence, module, name)

    def run(self, scope: Scope) -> list[Any]:
        """Label all nodes; the labels of what the graph returns."""
        for node in scope.module.graph.nodes:
            if node.op == "call_module":
                scope.known[node] = self._region(scope, node)
            elif node.op == "call_function":
                scope.known[node] = self._call(scope, node)
        return scope.returned()

    # regions

    def _region(self, scope: Scope, node: fx.Node) -> Any:
        module = self.root.get_submodule(str(node.target))
        region = region_of(module)
        assert isinstance(module, fx.GraphModule)
        assert region is not None
        if region.kind == "positions":
            return self._tables(output(module.graph).args[0])
        if region.kind in ROW_REGIONS:
            return self._rows(scope, node)
        inner = self.scope(module, str(node.target))
        places = [n for n in module.graph.nodes if n.op == "placeholder"]
        for place, value in zip(places, node.args, strict=True):
            if isinstance(value, fx.Node) and scope.known.get(value) is not None:
                inner.known[place] = scope.known[value]
        found = self.run(inner)
        several = isinstance(output(module.graph).args[0], tuple | list)
        return found if several else found[0]

    def _tables(self, returned: Any) -> Any:
        several = isinstance(returned, tuple | list)
        made = [self._table(i, node) for i, node in enumerate(returned if several else [returned])]
        return made if several else made[0]

    def _table(self, index: int, node: Any) -> Table | None:
        value = tensor(node)
        if value is None:
            return None
        dims = tuple(self.sequence.dims(value))
        if not all(self.sequence.whole(value.shape[dim]) for dim in dims):
            found = f"{node.name} {list(map(str, value.shape))}, of more or fewer rows than positions"
            raise refusal("positions", found, "values with one row for each position")
        return Table(index, value.dim(), dims, self.later.get(index))

    def _rows(self, scope: Scope, node: fx.Node) -> Any:
        """Of a region that acts on rows: results of the shape of its first input have its positions."""
        given = node.args[0]
        assert isinstance(given, fx.Node)
        axes, like, values = scope.known.get(given), tensor(given), node.meta["val"]
        if not isinstance(axes, Axes) or like is None:
            raise scope.refuse(node, "an expert layer that does not read one value for each position")

        def label(value: Any) -> Any:
            same = isinstance(value, Tensor) and list(map(str, value.shape)) == list(map(str, like.shape))
            return axes if same else Axes()

        return [label(v) for v in values] if isinstance(values, tuple | list) else label(values)

    # operators

    def _call(self, scope: Scope, node: fx.Node) -> Any:
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            held = scope.known.get(node.args[0])
            return held[node.args[1]] if isinstance(held, list) else None  # type: ignore[index]
        if node.target in READS_SHAPE_ONLY:
            return self._shaped(scope, node)
        if not any(isinstance(scope.known.get(n), Axes | Table) for n in node.all_input_nodes):
            if self.sequence.dims(tensor(node)):
                raise scope.refuse(node, "a value of positions that is made outside the positions region")
            return None
        rule = rule_of(node.target)
        if rule is None:
            raise scope.refuse(node, f"{node.target}, which is not known to keep positions apart")
        return rule(scope, node)

    def _shaped(self, scope: Scope, node: fx.Node) -> Any:
        """A value made from a shape: positions are where the sequence is."""
        value = tensor(node)
        dims = self.sequence.dims(value)
        if len(dims) > 1:
            raise scope.refuse(node, "a value over pairs of positions that is made inside a region")
        return Axes(self.sequence.by_size(value)) if dims and value is not None else None
