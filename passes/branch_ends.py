"""Which matrices end a branch of the residual stream: what they make is added to it, as it is.

    x_0 = x + dropout(attention_0(norm(x)))         attention_0's last product ends a branch
    x_1 = x_0 + mix_0(n, moe_0(n), ffn_0(n))        so do those of the experts and of the dense part

Read backwards from the head: through sums, norms, dropout, factors, views and regions, to the first product
or anything else that is not linear. Of these leaves, what depends on another leaf is a branch; what depends
on none is where the stream comes from (an embedding). A product that is a leaf and depends on none only
changes the width of the stream on its way in or out (OPT's `project_in`), and is read through.

Source: GPT-2 scales these by 1/√N, N the number of residual layers (Radford et al., 2019, section 2.3).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import moec.runtime.ops  # noqa: F401 - registers torch.ops.moec
from moec.ir import region_of
from moec.ir.graphs import output, weight_of
from moec.ir.patterns import is_call

from .vocabulary_sites import head
from .weight_roles import MOVES

aten, experts = torch.ops.aten, torch.ops.moec
PRODUCTS = (aten.linear.default, experts.grouped_linear.default)
# Of these the first argument alone is a value of the stream.
FIRST = MOVES | {
    aten.layer_norm.default, aten.rms_norm.default, aten.dropout.default, experts.combine.default,
    aten.div.Tensor, aten.neg.default,
}  # fmt: skip
ALL = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor}


@dataclass(frozen=True)
class Leaf:
    """Where reading backwards came to an end: `node` in the graph of `owner` ('' for the root), which stands
    at `place` in the root graph."""

    owner: str
    node: fx.Node
    place: fx.Node


@dataclass(frozen=True)
class BranchEnds:
    """`matrices`: structural names of the weights that end a branch; `branches`: how many there are."""

    matrices: frozenset[str]
    branches: int


def branch_ends(root: fx.GraphModule) -> BranchEnds:
    """The ends of all branches, in the root graph and in regions.

    Raises `MixedError` (see `vocabulary_sites.head`) for a program whose head cannot be told.
    """
    reading = _Backwards(root)
    product, _ = head(root)
    leaves = reading.leaves(product.args[0])
    while passed := [leaf for leaf in reading.sources(leaves) if is_call(leaf.node, *PRODUCTS)]:
        leaves -= set(passed)
        for leaf in passed:
            leaves |= reading.leaves(leaf.node.args[0], leaf.owner, leaf.place if leaf.owner else None)
    ends = [leaf for leaf in leaves - reading.sources(leaves) if is_call(leaf.node, *PRODUCTS)]
    names = {reading.matrix(leaf) for leaf in ends} - {""}
    return BranchEnds(frozenset(names), len({reading.site(leaf) for leaf in ends}))


class _Backwards:
    def __init__(self, root: fx.GraphModule) -> None:
        self.root = root
        self.above = _ancestors(root.graph)

    def leaves(self, node: Any, owner: str = "", place: fx.Node | None = None) -> set[Leaf]:
        """The leaves that the value of `node` is made of; each value is read once."""
        found, seen, todo = set[Leaf](), set[tuple[str, fx.Node]](), [(owner, node, place)]
        while todo:
            owner, node, place = todo.pop()
            if (owner, node) in seen:
                continue
            seen.add((owner, node))
            further = list(self._further(owner, node, place))
            todo += further
            if not further:
                found.add(Leaf(owner, node, place if place is not None else node))
        return found

    def _further(self, owner: str, node: fx.Node, place: fx.Node | None) -> Iterator[tuple[str, Any, Any]]:
        """What `node` is a linear function of; nothing for a leaf."""
        if node.op == "placeholder" and place is not None:
            inputs = [n for n in node.graph.nodes if n.op == "placeholder"]
            yield "", place.args[inputs.index(node)], None
        elif node.op == "call_module":
            yield from self._inside(node, None)
        elif node.target is operator.getitem and node.args[0].op == "call_module":  # type: ignore[union-attr]
            yield from self._inside(node.args[0], node.args[1])  # type: ignore[arg-type]
        elif node.target in FIRST or node.target is operator.getitem:
            yield owner, node.args[0], place
        elif node.target in ALL:
            yield from ((owner, given, place) for given in node.args[:2] if isinstance(given, fx.Node))

    def _inside(self, call: fx.Node, item: Any) -> Iterator[tuple[str, Any, Any]]:
        module = self.root.get_submodule(str(call.target))
        region = region_of(module)
        if region is None or region.kind == "positions":
            return
        assert isinstance(module, fx.GraphModule)
        returned: Any = output(module.graph).args[0]
        yield str(call.target), returned if item is None else returned[item], call

    def sources(self, leaves: set[Leaf]) -> set[Leaf]:
        """The leaves that depend on no other."""
        places = {leaf.place for leaf in leaves}
        return {leaf for leaf in leaves if not places & self.above[leaf.place]}

    def matrix(self, leaf: Leaf) -> str:
        """The structural name of the weight of a product, '' where it is computed."""
        matrix = leaf.node.args[1]
        while is_call(matrix, *MOVES):
            matrix = matrix.args[0]  # type: ignore[union-attr]
        module = self.root.get_submodule(leaf.owner)
        assert isinstance(matrix, fx.Node)
        if weight_of(module, matrix) is None:
            return ""
        return f"{leaf.owner}.{matrix.target}" if leaf.owner else str(matrix.target)

    def site(self, leaf: Leaf) -> object:
        """Experts and the dense part beside them are one branch."""
        region = region_of(self.root.get_submodule(leaf.owner)) if leaf.owner else None
        if region is None:
            return leaf.node
        return "attention" if region.kind == "attention" else "feed-forward", region.index


def _ancestors(graph: fx.Graph) -> dict[fx.Node, set[fx.Node]]:
    """What each node depends on."""
    above: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        direct = node.all_input_nodes
        above[node] = set(direct).union(*(above[source] for source in direct))
    return above
