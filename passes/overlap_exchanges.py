"""Start an expert layer's exchange before the dense feed-forward beside it, and await it after.

before:  f_3 = self.ffn_3(n)
         m_3, balance_3, z_3, counts_3 = self.moe_3(n)           # sends, waits, computes, sends back
after:   rows, …, balance_3, z_3, counts_3 = self.dispatch_3(n)  # sends
         f_3 = self.ffn_3(n)                                      # while the rows travel
         m_3 = self.moe_3(n, rows, …)                             # waits, computes, sends back

The dense feed-forward of a residual layer needs nothing of the exchange (PR-MoE, section 4.1.2). Layers
without one are left as they are. Weights of the first half (the router) keep their public names.

Assumes: `lower_experts` before it.
Contract: exact.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor, fx

import moec.runtime.ops  # noqa: F401 - registers torch.ops.moec
from moec.ir import Origin, Origins, Pass, Program, region_of, regions
from moec.ir.graphs import attribute, drop_unused, graph_module, named_weights, output, place, root_module
from moec.ir.identity import made_from
from moec.ir.patterns import is_call

WAIT = torch.ops._c10d_functional.wait_tensor.default
EXCHANGE = torch.ops.moec.exchange.default
aten = torch.ops.aten
CHEAP = {
    aten.sum.dim_IntList, aten.unflatten.int, aten.flatten.using_ints, aten.transpose.int, aten.t.default,
    aten.sym_size.int,
}  # fmt: skip


@dataclass(frozen=True)
class OverlapExchanges(Pass):
    """See the module."""

    makes: ClassVar[str] = "partitioned"

    def apply(self, program: Program) -> Program:
        for name in regions(program.graph, "moe"):
            call = next(n for n in program.graph.graph.nodes if n.op == "call_module" and n.target == name)
            beside = _dense_beside(program.graph, call)
            awaited = _last_arrival(program.graph.get_submodule(name))  # type: ignore[arg-type]
            if beside is not None and awaited is not None:
                program.origins = _split(program, call, beside, awaited)
        return program


def _dense_beside(root: fx.GraphModule, call: fx.Node) -> fx.Node | None:
    """The call of the dense feed-forward of the same layer that reads the same value, if there is one."""
    region = region_of(root.get_submodule(str(call.target)))
    assert region is not None
    for node in call.args[0].users:  # type: ignore[union-attr]
        other = region_of(root.get_submodule(str(node.target))) if node.op == "call_module" else None
        if other is not None and (other.kind, other.index) == ("ffn", region.index):
            return node
    return None


def _last_arrival(module: fx.GraphModule) -> fx.Node | None:
    """The wait for the rows that the experts compute, or None when no row travels."""
    first = next(n for n in module.graph.nodes if is_call(n, torch.ops.moec.grouped_linear.default))
    found = None
    for node in module.graph.nodes:
        if node is first:
            return found
        if is_call(node, WAIT) and is_call(node.args[0], EXCHANGE):
            found = node
    return None


def _split(program: Program, call: fx.Node, beside: fx.Node, awaited: fx.Node) -> Origins:
    root, module = program.graph, program.graph.get_submodule(str(call.target))
    assert isinstance(module, fx.GraphModule)
    region = region_of(module)
    assert region is not None
    terms = list(cast(tuple[fx.Node, ...], output(module.graph).args[0])[1:])
    started = cast(fx.Node, awaited.args[0])
    first = _ancestors([started, *terms])
    crossing = _crossing(module, first)
    crossing = [started, *(n for n in crossing if n is not started)]
    front = _first_half(module, first, [*crossing, *terms])
    front.meta["region"] = replace(region, kind="dispatch", roles={})
    name = f"dispatch_{region.index}"
    root.add_submodule(name, front)
    _second_half(module, first, crossing)
    _call_halves(root, call, beside, name, len(crossing), len(terms))
    return _moved_origins(program, name, str(call.target))


def _ancestors(nodes: list[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
            # Items of a tuple go with it: they cross to the second half, the tuple could not.
            waiting += [user for user in node.users if user.target is operator.getitem]
    return found


def _crossing(module: fx.GraphModule, first: set[fx.Node]) -> list[fx.Node]:
    """What the second half needs of the first, in order; sums and views of it are computed again."""
    found: set[fx.Node] = set()
    waiting = [
        source
        for node in module.graph.nodes
        if node not in first and node.op != "output"
        for source in node.all_input_nodes
    ]
    while waiting:
        node = waiting.pop()
        if node in first and node.op == "call_function":
            waiting += node.all_input_nodes if node.target in CHEAP else []
            found |= set() if node.target in CHEAP else {node}
    return [node for node in module.graph.nodes if node in found]


def _first_half(module: fx.GraphModule, first: set[fx.Node], results: list[fx.Node]) -> fx.GraphModule:
    graph, env, owner = fx.Graph(), dict[fx.Node, fx.Node](), root_module()
    for node in module.graph.nodes:
        if node in first:
            env[node] = graph.node_copy(node, lambda n: env[n])
            if node.op == "get_attr" and node.target != "training":
                value = attribute(module, str(node.target))
                assert isinstance(value, Tensor)
                place(owner, str(node.target), value)
    graph.output(tuple(env[node] for node in results))
    return graph_module(owner, graph)


def _second_half(module: fx.GraphModule, first: set[fx.Node], crossing: list[fx.Node]) -> None:
    """Turn the values that cross into inputs, in place; what the first half computes goes."""
    graph = module.graph
    end = output(graph)
    end.args = (end.args[0][0],)  # type: ignore[index]
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in reversed(crossing):
        with graph.inserting_after(last):
            given = graph.placeholder(node.name)
        node.replace_all_uses_with(given, propagate_meta=False)
        made_from(given, node, taking=("path", "source", "val", "placement"))
    names = {node: node.name for node in crossing}
    given_nodes = [node for node in graph.nodes if node.op == "placeholder"][-len(crossing) :]
    drop_unused(module)
    for node, given in zip(crossing, given_nodes, strict=True):
        given.name = given.target = names[node]
    module.recompile()


def _call_halves(
    root: fx.GraphModule, call: fx.Node, beside: fx.Node, name: str, num_crossing: int, num_terms: int
) -> None:
    graph = root.graph
    with graph.inserting_before(beside):
        front = graph.call_module(name, call.args)
        made_from(front, call, taking=("path", "source", "placement"))
        front.name = graph._graph_namespace.create_name(f"sent_{name.rpartition('_')[2]}", None)
        given = [graph.call_function(operator.getitem, (front, i)) for i in range(num_crossing + num_terms)]
    names = [node.target for node in root.get_submodule(str(call.target)).graph.nodes]  # type: ignore[union-attr]
    inputs = [str(target) for target in names[1 : 1 + num_crossing]]
    for node, label in zip(given, inputs, strict=False):
        node.name = graph._graph_namespace.create_name(f"{label}_{name.rpartition('_')[2]}", None)
    for user in list(call.users):
        position = user.args[1]
        assert isinstance(position, int)
        if position:
            term = given[num_crossing + position - 1]
            user.replace_all_uses_with(term, propagate_meta=False)
            graph.erase_node(user)
            term.name = user.name
    y = next(iter(call.users), None)
    call.args = (*call.args, *given[:num_crossing])
    if y is not None:
        y.replace_all_uses_with(call, propagate_meta=False)
        graph.erase_node(y)
        call.name = y.name
    beside_is_late = _index(graph, beside) > _index(graph, call)
    if beside_is_late:
        call.prepend(beside)
    for node in [n for n in given[num_crossing:] if not n.users]:
        graph.erase_node(node)
    root.recompile()


def _index(graph: fx.Graph, node: fx.Node) -> int:
    return next(i for i, other in enumerate(graph.nodes) if other is node)


def _moved_origins(program: Program, front: str, back: str) -> Origins:
    """The moved weights are the same ones: they keep their names."""
    moved = {name for name, _ in named_weights(program.graph) if name.startswith(f"{front}.")}
    rows = {}
    for name in moved:
        old = f"{back}.{name.partition('.')[2]}"
        rows[name] = Origin(program.origins.public_name(old))
    return program.origins.with_(rows)
