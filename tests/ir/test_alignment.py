"""Alignment of graphs that were rewritten at random, where every step is known."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from moec.errors import PassError
from moec.ir import Region, align, made_from
from moec.ir.graphs import fork, output, placeholder
from moec.ir.identity import identify, identities

aten = torch.ops.aten
OPERATORS = [aten.relu.default, aten.tanh.default, aten.sigmoid.default, aten.neg.default, aten.exp.default]
REGION = "part"
Step: TypeAlias = tuple[str, int, int, bool]


def start(length: int) -> fx.GraphModule:
    """A chain of calls, and an empty region that is called at its end."""
    inner = fx.Graph()
    inner.output(inner.placeholder("x"))
    part = fx.GraphModule(torch.nn.Module(), inner)
    part.meta["region"] = Region("ffn", 0)
    root, graph = fx.GraphModule(torch.nn.Module(), fx.Graph()), fx.Graph()
    root.add_module(REGION, part)
    value = graph.placeholder("tokens")
    for i in range(length):
        value = graph.call_function(OPERATORS[i % len(OPERATORS)], (value,))
    graph.output(graph.call_module(REGION, (value,)))
    root.graph = graph
    identify(root, "0")
    return root


@dataclass
class Rewriting:
    """Rewrites a graph, and writes down by hand what that means for each of its nodes.

    `was`: node that stands there → the node of the first graph that it is. `made`: node created → the nodes
    of the first graph that it was made from. `inside`: those in the region. `settled`: those of which
    nothing more is done in this pass, since what they are then would be a matter of choice.
    """

    root: fx.GraphModule
    was: dict[fx.Node, fx.Node]
    made: dict[fx.Node, set[fx.Node]] = field(default_factory=dict)
    inside: set[fx.Node] = field(default_factory=set)
    settled: set[fx.Node] = field(default_factory=set)

    def run(self, number: int, steps: list[Step]) -> None:
        """One pass, and what the runner does after it."""
        stood = identities(self.root)
        self.settled.clear()
        for word, at, operator, flag in steps:
            calls = [n for n in self.root.graph.nodes if n.op == "call_function"]
            if calls[at % len(calls)] not in self.settled:
                getattr(self, word)(calls, at % len(calls), OPERATORS[operator], flag)
        identify(self.root, stood.step(number + 1, steps), stood)

    def insert(self, calls: list[fx.Node], at: int, operator: object, said: bool) -> None:
        """A call behind another one; `said`: that it was made from it."""
        old = calls[at]
        with self.root.graph.inserting_after(old):
            new = self.root.graph.call_function(operator, (old,))
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self.made[new] = self.sources([old]) if said else set()
        if said:
            made_from(new, old)

    def replace(self, calls: list[fx.Node], at: int, operator: object, both: bool) -> None:
        """Another call in the place of one, made from that, or from that and the next one."""
        old = calls[at]
        others = [old, calls[(at + 1) % len(calls)]] if both else [old]
        with self.root.graph.inserting_before(old):
            new = made_from(self.root.graph.call_function(operator, old.args), *others)
        self.made[new] = self.sources(others)
        self.leave(old, new)

    def erase(self, calls: list[fx.Node], at: int, _: object, __: bool) -> None:
        """One less; the last one stays."""
        if len(calls) > 1:
            self.leave(calls[at], calls[at].all_input_nodes[0])

    def move(self, calls: list[fx.Node], _: int, __: object, ___: bool) -> None:
        """The last call into the region, at its front."""
        old, graph = calls[-1], self.root.get_submodule(REGION).graph
        if len(calls) == 1 or old in self.settled:
            return
        x = placeholder(graph)
        with graph.inserting_after(x):
            new = graph.node_copy(old, lambda n: x)
        x.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        if old in self.was:
            self.was[new] = self.was[old]
        else:
            self.made[new] = self.made[old]
        self.inside.add(new)
        self.leave(old, old.all_input_nodes[0])

    def copy(self, calls: list[fx.Node], at: int, _: object, renamed: bool) -> None:
        """The same call a second time: the one that stood there stays what it was, whatever its name."""
        old = calls[at]
        with self.root.graph.inserting_after(old):
            new = self.root.graph.node_copy(old, lambda n: old)
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        if renamed:
            old.name, new.name = new.name, old.name
        self.made[new] = self.sources([old])
        self.settled.add(old)

    def retarget(self, calls: list[fx.Node], at: int, operator: Any, _: bool) -> None:
        """Another operator, in place: another node."""
        old = calls[at]
        if old.target is not operator:
            old.target = operator
            if old in self.was:
                self.made[old] = {self.was.pop(old)}
            self.settled.add(old)

    def sources(self, nodes: list[fx.Node]) -> set[fx.Node]:
        """Where these come from in the first graph."""
        return {a for n in nodes for a in ({self.was[n]} if n in self.was else self.made[n])}

    def leave(self, old: fx.Node, value: fx.Node) -> None:
        """Who read `old` reads `value`; `old` is gone."""
        old.replace_all_uses_with(value)
        old.graph.erase_node(old)
        self.was.pop(old, None)
        self.made.pop(old, None)


WORDS = ("insert", "replace", "erase", "move", "copy", "retarget")
moves = st.lists(
    st.tuples(st.sampled_from(WORDS), st.integers(0, 9), st.integers(0, len(OPERATORS) - 1), st.booleans()),
    max_size=6,
)


@given(st.integers(1, 6), st.lists(moves, min_size=1, max_size=3))
def test_random_rewrites_are_told_as_they_were_done(length: int, passes: list[list[Step]]) -> None:
    """Each list is one pass; the first graph is compared with what each of them leaves."""
    before = start(length)
    root = fork(before)
    work = Rewriting(root, dict(zip(nodes(root), nodes(before), strict=True)))
    for number, steps in enumerate(passes):
        work.run(number, steps)
        require(work, before)


def nodes(root: fx.GraphModule) -> list[fx.Node]:
    return [n for graph in (root.graph, root.get_submodule(REGION).graph) for n in graph.nodes]


def require(work: Rewriting, before: fx.GraphModule) -> None:
    aligned = align(before, work.root)
    kept = {new.node: old.node for old, new in aligned.kept.values()}
    assert kept == work.was
    assert {place.node for place in aligned.created.values()} == work.made.keys()
    assert {p.node for p in aligned.removed.values()} == set(nodes(before)) - set(work.was.values())
    moved = {aligned.kept[key][1].node for key in aligned.moved}
    assert moved == {n for n in work.inside if n in work.was}
    rewired = {aligned.kept[key][1].node for key in aligned.rewired}
    assert rewired == {
        new for new, old in work.was.items()
        if new not in moved and [work.was.get(n) for n in new.all_input_nodes] != old.all_input_nodes
    }  # fmt: skip
    key_of = {place.node: key for key, place in aligned.created.items()}
    identity = {old.node: key for key, (old, _) in aligned.kept.items()}
    identity |= {place.node: key for key, place in aligned.removed.items()}
    for new, sources in work.made.items():
        assert set(aligned.ancestors.get(key_of[new], ())) == {identity[source] for source in sources}


def test_a_graph_is_aligned_with_itself() -> None:
    root = start(4)
    aligned = align(root, fork(root))
    assert set(map(aligned.status, aligned.kept)) == {"kept"}
    assert not aligned.created
    assert not aligned.removed


def test_status_names_every_node() -> None:
    before = start(3)
    after = fork(before)
    stood, end = identities(after), output(after.graph)
    last = end.all_input_nodes[0]
    with after.graph.inserting_before(end):
        new = after.graph.call_function(aten.abs.default, (last,))
    end.args = (new,)
    identify(after, 1, stood)
    aligned = align(before, after)
    assert [aligned.status(key) for key in aligned.created] == ["created"]
    assert {aligned.status(key) for key in aligned.rewired} == {"rewired"}
    assert [aligned.kept[key][1].node.op for key in aligned.rewired] == ["output"]
    assert align(after, before).status(next(iter(aligned.created))) == "removed"
    with pytest.raises(KeyError):
        aligned.status("no such node")


def test_two_nodes_of_one_identity_are_refused() -> None:
    root = start(2)
    one, other = (n for n in root.graph.nodes if n.op == "call_function")
    other.meta["id"] = one.meta["id"]
    with pytest.raises(PassError, match="the identity of"):
        align(root, root)
