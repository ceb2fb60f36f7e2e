"""The residual stream of a program, found by dataflow: values that everything goes through.

A *cut* is a value of the stream, [B, S, D], that nothing of the stream jumps over and that every attention
and feed-forward either leads to or follows from. Values made before the first attention or feed-forward may
be read by every layer (an embedding that is added again): they are no part of the stream. Loss terms are not
looked at. `blocks.py` says which cuts are the ends of layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from moec.errors import PassError
from moec.ir import Region, region_of
from moec.ir.dependence import READS_SHAPE_ONLY, token_dependent
from moec.ir.graphs import output, placeholder

aten = torch.ops.aten
ATTENTION_CORES = {aten.scaled_dot_product_attention.default, aten.softmax.int}


def logits_of(graph: fx.Graph) -> fx.Node:
    """The node that is the program's logits, with loss terms beside it or without."""
    result: Any = output(graph).args[0]
    found = result[0] if isinstance(result, tuple | list) else result
    assert isinstance(found, fx.Node)
    return found


def ancestors(node: fx.Node) -> set[fx.Node]:
    """`node` and everything it is computed from."""
    found, stack = {node}, [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                stack.append(source)
    return found


@dataclass
class Group:
    """A cut that completes some attentions or feed-forwards, and the cuts that follow without any.

    `working`: those attentions and feed-forwards; `kind`: `a`, `f` or `af`.
    """

    kind: str
    working: list[fx.Node]
    run: list[fx.Node]


class Stream:
    """The part of a root graph that logits are computed from, and its cuts."""

    def __init__(self, root: fx.GraphModule) -> None:
        self.root = root
        live = ancestors(logits_of(root.graph))
        self.nodes = [node for node in root.graph.nodes if node in live]
        self.says = _says(root)
        called = [node for node in self.nodes if _kind(root, node)]
        if not called:
            found = "no attention and no feed-forward that is a region"
            raise PassError("the layers of the program", found, "a decoder at stage structured or sparse")
        self.shape = _shape(called[0].args[0])
        self.working = self._working(set(called))
        self.bits = {node: 1 << i for i, node in enumerate(self.working)}
        self.before, self.after = self._masks()
        reached = token_dependent(root.graph, set(called))
        self.body = {node for node in self.nodes if node in reached}

    def _working(self, called: set[fx.Node]) -> list[fx.Node]:
        """Attentions and feed-forwards: regions, cores of attention and products that are in none."""
        later, head = token_dependent(self.root.graph, called), _head(self.root.graph)
        loose = {*ATTENTION_CORES, aten.linear.default}
        return [n for n in self.nodes if n in called or (n in later and n.target in loose and n is not head)]

    def _masks(self) -> tuple[dict[fx.Node, int], dict[fx.Node, int]]:
        """For each node, as bits: what works before it (or is it), and what works after it."""
        before, after = dict[fx.Node, int](), dict.fromkeys(self.nodes, 0)
        for node in self.nodes:
            before[node] = self.bits.get(node, 0)
            for source in node.all_input_nodes:
                before[node] |= before[source]
        for node in reversed(self.nodes):
            for source in node.all_input_nodes:
                after[source] |= after[node] | self.bits.get(node, 0)
        return before, after

    def cuts(self) -> list[fx.Node]:
        """Values of the stream that nothing jumps over, in order."""
        place = {node: i for i, node in enumerate(self.nodes)}
        found, seen, furthest = [], 0, -1
        everything = (1 << len(self.working)) - 1
        for node in self.nodes:
            seen |= self.bits.get(node, 0)
            if node not in self.body or _shape(node) != self.shape:
                continue
            divides = self.before[node] == seen and self.after[node] == everything & ~seen
            if furthest <= place[node] and divides:
                found.append(node)
            furthest = max([furthest, *(place[user] for user in node.users if user in place)])
        return found

    def groups(self) -> list[Group]:
        """Cuts by what they complete; raises `PassError` where there are none."""
        groups: list[Group] = []
        done = 0
        for cut in self.cuts():
            fresh = [node for node in self.working if self.bits[node] & self.before[cut] & ~done]
            done |= self.before[cut]
            if fresh:
                kinds = {_kind(self.root, node) or _loose_kind(node) for node in fresh}
                groups.append(Group("".join(sorted(kinds)), fresh, [cut]))
            elif groups:
                groups[-1].run.append(cut)
        if not groups:
            found = f"no value {self.shape} that everything goes through"
            raise PassError("the layers of the program", found, "a residual stream")
        return groups

    def entry(self, exit_: fx.Node) -> fx.Node:
        """What the first block reads: the last value of the stream before it that all of it follows from."""
        inside = ancestors(exit_)
        made = [n for n in self.nodes if n in inside and n in self.says and n not in self.body]
        read = [n for n in made if any(user in inside and user in self.body for user in n.users)]
        for node in reversed(made):
            later = token_dependent(self.root.graph, {node})
            if _shape(node) == self.shape and later.issuperset(read):
                return node
        found = f"no value {self.shape} that all of it follows from"
        raise PassError(f"the first layer, up to `{exit_.name}`", found, "a residual stream")


# what a node is


def _says(root: fx.GraphModule) -> set[fx.Node]:
    """What depends on the values of tokens; the region of positions reads their shape alone."""
    found = {placeholder(root.graph)}
    for node in root.graph.nodes:
        region = region_called(root, node)
        reads_values = node.target not in READS_SHAPE_ONLY and (region is None or region.kind != "positions")
        if reads_values and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _head(graph: fx.Graph) -> fx.Node | None:
    """The product that gives the logits."""
    node: Any = logits_of(graph)
    while isinstance(node, fx.Node) and node.target is not aten.linear.default:
        tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        node = tensors[0] if tensors else None
    return node


def _kind(root: fx.GraphModule, node: fx.Node) -> str:
    """`a` for a call of an attention, `f` of a feed-forward or a part of one; '' for anything else."""
    region = region_called(root, node)
    if region is None or region.kind == "positions":
        return ""
    return "a" if region.kind == "attention" else "f"


def _loose_kind(node: fx.Node) -> str:
    return "a" if node.target in ATTENTION_CORES else "f"


def region_called(root: fx.GraphModule, node: fx.Node) -> Region | None:
    """The region that `node` calls; None for any other node."""
    return region_of(root.get_submodule(str(node.target))) if node.op == "call_module" else None


def _shape(node: object) -> list[str]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return [str(size) for size in value.shape] if floating else []  # type: ignore[union-attr]
