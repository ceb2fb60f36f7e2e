"""Identities: who keeps one, who gets a new one, and what is remembered of those before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import fx

import moec
from moec.errors import PassError
from moec.ir import Pass, Program, align, identity_of, made_from
from moec.ir.graphs import fork
from moec.ir.identity import DESCENT, ID, MADE_FROM, identified, identify, identities, places, take_facts
from moec.ir.parse import parse_program
from moec.ir.patterns import arguments_of
from moec.ir.text import program_text
from moec.passes.names import rename
from moec.passes.runner import Runner
from tests.ir.hand_made import model

aten = torch.ops.aten


def line() -> fx.GraphModule:
    """y = sigmoid(relu(x)), identified at step 0."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_function(aten.relu.default, (x,))
    first.meta = {"path": "h.0", "source": "gpt.py:3"}
    graph.output(graph.call_function(aten.sigmoid.default, (first,)))
    root = fx.GraphModule(torch.nn.Module(), graph)
    identify(root, 0)
    return root


def node(root: fx.GraphModule, target: Any) -> fx.Node:
    return next(n for n in root.graph.nodes if n.target is target)


def ids(root: fx.GraphModule) -> list[str]:
    return [identity_of(place.node) for place in places(root)]


def test_births_are_numbered_in_order() -> None:
    assert ids(line()) == ["0.0", "0.1", "0.2", "0.3"]


def test_a_fork_and_new_names_keep_identities() -> None:
    root = line()
    copied = fork(root)
    rename(copied, {n: f"n_{i}" for i, n in enumerate(copied.graph.nodes)})
    assert ids(copied) == ids(root)
    assert [n.target for n in copied.graph.nodes if n.op == "placeholder"] == ["n_0"]


def test_a_node_without_identity_says_so() -> None:
    graph = fx.Graph()
    with pytest.raises(PassError, match="no identity"):
        identity_of(graph.placeholder("x"))


def test_made_from_takes_the_place_and_remembers_who() -> None:
    root = line()
    relu, sigmoid = node(root, aten.relu.default), node(root, aten.sigmoid.default)
    relu.meta["val"] = 1
    with root.graph.inserting_after(sigmoid):
        made = root.graph.call_function(aten.tanh.default, (relu,))
    assert made_from(made, relu, sigmoid) is made
    assert made.meta == {"path": "h.0", "source": "gpt.py:3", "made_from": ("0.1", "0.2")}
    assert made_from(made, relu, taking=("val",)).meta == {"val": 1, "made_from": ("0.1",)}


def test_what_was_made_on_the_way_is_passed_over() -> None:
    """Of a node that is made and gone within one pass nothing is remembered but what it was made from."""
    root = line()
    relu = node(root, aten.relu.default)
    with root.graph.inserting_after(relu):
        way = made_from(root.graph.call_function(aten.tanh.default, (relu,)), relu)
        last = made_from(root.graph.call_function(aten.exp.default, (relu,)), way)
    root.graph.erase_node(way)
    assert last.meta[MADE_FROM] == ("0.1",)


def test_descent_outlives_the_nodes_between() -> None:
    root = line()
    first = fork(root)
    for step, target in enumerate((aten.tanh.default, aten.exp.default, aten.sin.default)):
        old = node(root, aten.relu.default) if step == 0 else next(
            n for n in root.graph.nodes if n.meta.get(MADE_FROM)
        )  # fmt: skip
        with root.graph.inserting_before(old):
            new = made_from(root.graph.call_function(target, old.args), old)
        old.replace_all_uses_with(new)
        root.graph.erase_node(old)
        identify(root, step + 1)
    last = node(root, aten.sin.default)
    assert identity_of(last) == "3.0"
    assert last.meta[MADE_FROM] == ("2.0",)
    assert last.meta[DESCENT] == {"2.0": ("1.0",), "1.0": ("0.1",)}
    assert align(first, root).ancestors == {"3.0": ("0.1",)}


def test_a_copy_is_the_node_once_it_is_gone() -> None:
    root = line()
    before, relu = identities(root), node(root, aten.relu.default)
    with root.graph.inserting_before(relu):
        copied = root.graph.node_copy(relu)
    relu.replace_all_uses_with(copied)
    root.graph.erase_node(relu)
    identify(root, 1, before)
    assert identity_of(copied) == "0.1"


@pytest.mark.parametrize("first", ["copy", "original"])
def test_the_one_that_stood_there_keeps_its_identity(first: str) -> None:
    """Also where the copy comes first, under the name of the original."""
    root = line()
    before, relu = identities(root), node(root, aten.relu.default)
    with root.graph.inserting_before(relu) if first == "copy" else root.graph.inserting_after(relu):
        copied = root.graph.node_copy(relu)
    relu.name, copied.name = "other", relu.name
    identify(root, 1, before)
    assert (identity_of(relu), identity_of(copied)) == ("0.1", "1.0")
    assert copied.meta[MADE_FROM] == ("0.1",)


def test_another_operator_is_another_node() -> None:
    root = line()
    before, relu = identities(root), node(root, aten.relu.default)
    relu.target = aten.tanh.default
    identify(root, 1, before)
    assert identity_of(relu) == "1.0"
    assert relu.meta[MADE_FROM] == ("0.1",)


def test_facts_are_taken_without_the_identity() -> None:
    root = line()
    relu, sigmoid = node(root, aten.relu.default), node(root, aten.sigmoid.default)
    take_facts(sigmoid, relu)
    assert sigmoid.meta == {"path": "h.0", "source": "gpt.py:3", "id": "0.2"}


def test_graphs_that_read_alike_have_the_same_identities_and_no_others() -> None:
    first, again, other = line(), line(), line()
    for n in other.graph.nodes:
        n.name = f"{n.name}_of_another"
    for root in (first, again, other):
        for n in root.graph.nodes:
            n.meta.pop(ID)
        identified(root, 0)
    assert ids(first) == ids(again)
    assert not set(ids(first)) & set(ids(other))


# programs


def test_a_program_that_is_read_has_identities() -> None:
    root = model()
    weights = {**dict(root.named_parameters()), **dict(root.named_buffers())}
    made = parse_program(program_text(root)).assemble(weights)
    assert len(set(ids(made))) == len(ids(made)) > 10


def program() -> Program:
    made = moec.compile(moec.testing.DecoderRecipe(num_layers=1).build(), verify="off")
    return Program(made.graph, **made._records())


@dataclass(frozen=True)
class _Rewrite(Pass):
    """A pass that is made up: puts `how` in the place of the first product of the root."""

    how: str

    def apply(self, program: Program) -> Program:
        graph = program.graph.graph
        old = next(n for n in graph.nodes if n.target is aten.linear.default)
        with graph.inserting_before(old):
            new = graph.call_function(torch.ops.moec.linear.default, arguments_of(old))
        if self.how == "stolen":  # the meta of one operator on another, its identity with it
            new.meta = dict(old.meta)
        elif self.how == "taken over":  # the identity of one that stands there on another that does
            graph.erase_node(new)
            other = next(n for n in graph.nodes if n.target is aten.embedding.default)
            other.meta = dict(old.meta)
            return program
        else:
            made_from(new, old)
        old.replace_all_uses_with(new)
        graph.erase_node(old)
        program.graph.recompile()
        return program


def product(made: Program) -> fx.Node:
    ours = (aten.linear.default, torch.ops.moec.linear.default)
    return next(n for n in made.graph.graph.nodes if n.target in ours)


def test_a_pass_that_copies_meta_onto_another_operator_is_caught() -> None:
    """An identity goes to no other operator: the node is another one, made from it; as if it were said."""
    before = program()
    for how in ("stolen", "said"):
        after = Runner(verify="off").run(before, [_Rewrite(how)])
        aligned = align(before.graph, after.graph)
        old, new = identity_of(product(before)), identity_of(product(after))
        assert list(aligned.removed) == [old]
        assert list(aligned.created) == [new]
        assert aligned.ancestors == {new: (old,)}


def test_a_pass_cannot_take_an_identity_from_one_node_to_another() -> None:
    before = program()
    aligned = align(before.graph, Runner(verify="off").run(before, [_Rewrite("taken over")]).graph)
    assert not aligned.created
    assert not aligned.removed


def test_programs_that_part_ways_share_what_was_before_and_nothing_else() -> None:
    before = program()
    one, again, other = (
        Runner(verify="off").run(before, [_Rewrite(how)]) for how in ("said", "said", "stolen")
    )
    assert ids(one.graph) == ids(again.graph)
    aligned = align(one.graph, other.graph)
    assert [place.node.target for place in aligned.created.values()] == [torch.ops.moec.linear.default]
    assert len(aligned.kept) == len(ids(before.graph)) - 1


def test_a_graph_made_by_hand_gets_identities_when_a_pass_runs() -> None:
    before = program()
    for place in places(before.graph):
        place.node.meta.pop(ID)
    after = Runner(verify="off").run(before, [_Rewrite("said")])
    assert len(align(before.graph, after.graph).created) == 1
