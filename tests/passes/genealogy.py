"""What a pass really did to each node, told by the node objects themselves and never by their identities.

`watched(rewrite)` looks over a pass's shoulder: which objects stood in the graph when `apply` began, which
stand in it when it is done, and which were made by copying which (`fx.Graph.node_copy`, also inside
`copy.deepcopy`). From that alone:

* an object that still stands there, with the operator it had, is kept;
* of one that is gone, a copy with its operator is it; of several copies exactly one is;
* a weight that was read by a node that is gone is read by the new node that reads the same tensor;
* everything else is created or removed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from torch import Tensor, fx

from moec.ir import Pass, Program, align, region_of
from moec.ir.graphs import attribute, graph_modules


@dataclass
class Stood:
    """One node as it stood at one time: its name, target and region, what it reads, and which weight."""

    name: str
    target: str
    region: str
    operator: object
    args: Any
    tensor: Tensor | None


@dataclass
class Genealogy:
    """The nodes before and after one run of a pass, and copies → what they were copied from."""

    before: dict[fx.Node, Stood] = field(default_factory=dict)
    after: dict[fx.Node, Stood] = field(default_factory=dict)
    copies: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def origin(self, node: fx.Node) -> fx.Node | None:
        """The node of the graph before that `node` is, or is a copy of a copy of."""
        while node not in self.before and node in self.copies:
            node = self.copies[node]
        return node if node in self.before else None


@contextmanager
def watched(rewrite: Pass) -> Iterator[Genealogy]:
    """Inside, what `rewrite.apply` does is recorded."""
    found, apply, copy = Genealogy(), type(rewrite).apply, fx.Graph.node_copy

    def copying(graph: fx.Graph, node: fx.Node, transform: Callable[[fx.Node], Any] = lambda n: n) -> fx.Node:
        made = copy(graph, node, transform)
        found.copies[made] = node
        return made

    def applying(self: Pass, program: Program) -> Program:
        found.before = _stood(program.graph)
        with patch.object(fx.Graph, "node_copy", copying):
            made = apply(self, program)
        found.after = _stood(made.graph)
        return made

    with patch.object(type(rewrite), "apply", applying):
        yield found


def _stood(root: fx.GraphModule) -> dict[fx.Node, Stood]:
    found: dict[fx.Node, Stood] = {}
    for name, module in graph_modules(root):
        for node in module.graph.nodes:
            value = attribute(module, str(node.target)) if node.op == "get_attr" else None
            read = value if isinstance(value, Tensor) else None
            found[node] = Stood(
                node.name, str(node.target), name, _operator(module, node), (node.args, node.kwargs), read
            )
    return found


def _operator(module: fx.GraphModule, node: fx.Node) -> object:
    """The operator of a call, the kind of a called region, the kind of any other node."""
    if node.op == "call_function":
        return node.target
    if node.op == "call_module":
        region = region_of(module.get_submodule(str(node.target)))
        return node.op, str(node.target) if region is None else region.kind
    return node.op


@dataclass
class Truth:
    """`kept`: nodes before → the nodes after of which exactly one is it. `weights`: a tensor → how many of
    the new nodes that read it are old ones, of which nodes before, and which those new ones are. `sources`:
    created nodes → what they were copied from, or were before their operator changed."""

    kept: dict[fx.Node, list[fx.Node]]
    weights: list[tuple[int, set[fx.Node], set[fx.Node]]]
    sources: dict[fx.Node, fx.Node]


def truth_of(found: Genealogy) -> Truth:
    """What the rewrite did, by the rules above."""
    heirs: dict[fx.Node, list[fx.Node]] = {}
    for node in found.after:
        origin = found.origin(node)
        if origin is not None:
            heirs.setdefault(origin, []).append(node)
    kept = {old: _able(found, old, nodes) for old, nodes in heirs.items()}
    kept = {old: nodes for old, nodes in kept.items() if nodes}
    sources = {node: old for old, nodes in heirs.items() for node in nodes if node not in kept.get(old, ())}
    return Truth(kept, _weights(found, kept, heirs), sources)


def _able(found: Genealogy, old: fx.Node, nodes: list[fx.Node]) -> list[fx.Node]:
    same = [node for node in nodes if found.after[node].operator == found.before[old].operator]
    return [old] if old in same else same


def _weights(
    found: Genealogy, kept: dict[fx.Node, list[fx.Node]], heirs: dict[fx.Node, list[fx.Node]]
) -> list[tuple[int, set[fx.Node], set[fx.Node]]]:
    gone: dict[int, set[fx.Node]] = {}
    for old, stood in found.before.items():
        if stood.tensor is not None and old not in kept:
            gone.setdefault(id(stood.tensor), set()).add(old)
    inherited = {node for nodes in heirs.values() for node in nodes}
    new: dict[int, set[fx.Node]] = {key: set() for key in gone}
    for node, stood in found.after.items():
        if stood.tensor is not None and node not in inherited and id(stood.tensor) in gone:
            new[id(stood.tensor)].add(node)
    return [(min(len(gone[key]), len(new[key])), gone[key], new[key]) for key in gone]


def require_true(before: Program, after: Program, found: Genealogy) -> Counter[str]:
    """Compare `align` of the two programs with the truth, node by node; returns what was counted.

    The pass ran on a fork of `before`, whose nodes stand in the order of the originals; `after` holds the
    nodes that the pass left.
    """
    original = _originals(before, found)
    aligned = align(before.graph, after.graph)
    pairs = {original[old.node]: new.node for old, new in aligned.kept.values()}
    truth = truth_of(found)
    _require_kept(found, truth, pairs)
    created = {place.node for place in aligned.created.values()}
    removed = {original[place.node] for place in aligned.removed.values()}
    assert created == found.after.keys() - set(pairs.values())
    assert removed == found.before.keys() - pairs.keys()
    _require_reads(found, pairs, aligned, original)
    _require_sources(truth, aligned, original)
    words = Counter(aligned.status(key) for key in aligned.kept)
    return words + Counter(created=len(created), removed=len(removed))


def _originals(before: Program, found: Genealogy) -> dict[fx.Node, fx.Node]:
    """The nodes of `before` → those of its fork."""
    there = _stood(before.graph)
    assert [stood.name for stood in there.values()] == [stood.name for stood in found.before.values()]
    return dict(zip(there, found.before, strict=True))


def _require_kept(found: Genealogy, truth: Truth, pairs: dict[fx.Node, fx.Node]) -> None:
    for old, nodes in truth.kept.items():
        assert pairs.get(old) in nodes, f"{old.name} is {nodes}, and not {pairs.get(old)}"
    rest = {old: new for old, new in pairs.items() if old not in truth.kept}
    for count, gone, new in truth.weights:
        same = {old: node for old, node in rest.items() if old in gone}
        assert len(same) == count, f"{count} readers of a weight stay, and not {same}"
        assert set(same.values()) <= new
        rest = {old: node for old, node in rest.items() if old not in gone}
    assert not rest, f"kept by nobody's doing: {rest}"


def _require_reads(
    found: Genealogy, pairs: dict[fx.Node, fx.Node], aligned: Any, original: dict[fx.Node, fx.Node]
) -> None:
    """`moved` and `rewired` are where regions and reads differ."""
    known = {new: old for old, new in pairs.items()}
    words = {original[old.node]: aligned.status(key) for key, (old, _) in aligned.kept.items()}
    calls = _calls(found.before, {}), _calls(found.after, known)
    for old, new in pairs.items():
        was, is_ = found.before[old], found.after[new]
        same_call = was.region in calls[0] and calls[0][was.region] is calls[1].get(is_.region)
        moved = was.region != is_.region and not same_call
        reads = _spelled(was.args) != _spelled(is_.args, known)
        assert words[old] == ("moved" if moved else "rewired" if reads else "kept"), (old.name, new.name)


def _calls(nodes: dict[fx.Node, Stood], known: dict[fx.Node, fx.Node]) -> dict[str, fx.Node]:
    """Region → the node that calls it first; as it was before, where `known` has it."""
    found: dict[str, fx.Node] = {}
    for node, stood in nodes.items():
        if node.op == "call_module":
            owner = f"{stood.region}." if stood.region else ""
            found.setdefault(f"{owner}{stood.target}", known.get(node, node))
    return found


class _Spelled:
    """Stands for a node among arguments."""

    def __init__(self, node: fx.Node | None) -> None:
        self.node = node

    def __repr__(self) -> str:
        return "<another>" if self.node is None else f"<{id(self.node)}>"


def _spelled(args: Any, known: dict[fx.Node, fx.Node] | None = None) -> str:
    """Arguments, nodes spelled as objects; where `known` is given, as the ones they were before, if any."""

    def spelled(node: fx.Node) -> Any:
        return _Spelled(node if known is None else known.get(node))

    return repr(fx.node.map_arg(args, spelled))


def _require_sources(truth: Truth, aligned: Any, original: dict[fx.Node, fx.Node]) -> None:
    """What was copied, or became another operator, is said to be made from what it was."""
    of = {original[place.node]: key for place, key in _before(aligned)}
    for key, place in aligned.created.items():
        if place.node in truth.sources:
            assert of[truth.sources[place.node]] in aligned.ancestors.get(key, ()), place.node.name


def _before(aligned: Any) -> Iterator[tuple[Any, str]]:
    yield from ((place, key) for key, place in aligned.removed.items())
    yield from ((old, key) for key, (old, _) in aligned.kept.items())
