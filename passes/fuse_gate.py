"""Put a layer's router, choice of experts and table of rows into one operator.

before:  scores = moec.router(tokens, self.router.weight)
         weights, experts = moec.route(scores, None, top_k=2, …)
         order, counts = moec.assign(experts, num_experts=4, …)
after:   scores, weights, experts, order, counts = moec.gate(tokens, self.router.weight, None, top_k=2, …)

A layer of a rank whose capacity is that of all ranks' tokens keeps its parts: between the choice and the
table its ranks tell each other what was chosen (`moec.admit`).

Assumes: expert layers as `lift_experts` writes them.
Contract: exact.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import moec.runtime.ops  # noqa: F401 - registers torch.ops.moec
from moec.ir import Check, Pass, Program
from moec.ir.graphs import drop_unused, graph_modules
from moec.ir.identity import made_from
from moec.ir.patterns import arguments_of, is_call

from .fusion_notes import note_fusions
from .prove_fusion import prove_fusion

ops = torch.ops.moec
NAMES = ("scores", "weights", "experts", "order", "counts")


@dataclass(frozen=True)
class FuseGate(Pass):
    """See the module."""

    def apply(self, program: Program) -> Program:
        findings = []
        for name, module in graph_modules(program.graph):
            for router in [node for node in module.graph.nodes if is_call(node, ops.router.default)]:
                table, reason = _table(router)
                if table is not None:
                    _fuse(module, router, table)
                findings.append((name, reason or "router, route and assign in one operator, moec.gate"))
        note_fusions(program, self.name, findings)
        return program

    def ensures(self, before: Program, after: Program) -> list[Check]:
        """Every result and gradient, in both modes."""
        return prove_fusion(before, after)


def _table(router: fx.Node) -> tuple[fx.Node | None, str]:
    """The `assign` that ends what `router` begins, or the reason there is none."""
    routes = [user for user in router.users if is_call(user, ops.route.default) and user.args[0] is router]
    if len(routes) != 1:
        return None, f"stays: its scores are routed {len(routes)} times"
    chosen = _item(routes[0], 1)
    readers = [] if chosen is None else list(chosen.users)
    tables = [user for user in readers if is_call(user, ops.assign.default)]
    if len(tables) != 1:
        admitted = any(is_call(user, ops.admit.default) for user in readers)
        why = "its capacity counts the tokens of all ranks (moec.admit)" if admitted else "no table of rows"
        return None, f"router, route and assign stay: {why}"
    experts = router.args[1].meta["val"].shape[0]  # type: ignore[union-attr]
    if arguments_of(tables[0])[1] != experts:
        return None, f"stays: a table of other than {experts} experts, one a score"
    return tables[0], ""


def _item(node: fx.Node, place: int) -> fx.Node | None:
    return next((u for u in node.users if u.target is operator.getitem and u.args[1] == place), None)


def _fuse(module: fx.GraphModule, router: fx.Node, table: fx.Node) -> None:
    chosen: Any = arguments_of(table)[0]
    route: fx.Node = chosen.args[0]
    old = {"scores": router, **_items(route, "weights", "experts"), **_items(table, "order", "counts")}
    fused, made = _call(router, route, table)
    names = {name: node.name for name, node in old.items()}
    for name, node in old.items():
        for user in [user for user in node.users if node is not router or user is not route]:
            user.replace_input_with(node, made[name])
    _move_readers(module.graph, fused, made)
    for node in [old[n] for n in ("order", "counts") if n in old] + [table]:
        module.graph.erase_node(node)
    for node in [old[n] for n in ("weights", "experts") if n in old] + [route, router]:
        module.graph.erase_node(node)
    for name, kept in names.items():
        made[name].name = kept
    drop_unused(module)


def _call(router: fx.Node, route: fx.Node, table: fx.Node) -> tuple[fx.Node, dict[str, fx.Node]]:
    """The operator before `table`, and its five results by name."""
    graph = table.graph
    _, bias, top_k, gate, noise, _ = arguments_of(route)
    _, _, *limits = arguments_of(table)
    inputs = (*arguments_of(router), bias, top_k, gate, noise, *limits)
    with graph.inserting_before(table):
        fused = graph.call_function(ops.gate.default, inputs)
        fused.name = graph._graph_namespace.create_name("gated", None)
        made = {name: graph.call_function(operator.getitem, (fused, i)) for i, name in enumerate(NAMES)}
    made_from(fused, router, route, table)
    for node, part in zip(made.values(), (router, route, route, table, table), strict=True):
        made_from(node, part)
    return fused, made


def _items(node: fx.Node, *names: str) -> dict[str, fx.Node]:
    found = {name: _item(node, place) for place, name in enumerate(names)}
    return {name: item for name, item in found.items() if item is not None}


def _move_readers(graph: fx.Graph, fused: fx.Node, made: dict[str, fx.Node]) -> None:
    """Values that were read between the parts (a loss of the scores, say) are read after the whole now."""
    after, last = {fused, *made.values()}, made[NAMES[-1]]
    before = set(_until(graph, fused))
    for node in [n for n in graph.nodes if n in before]:
        if any(source in after for source in node.all_input_nodes):
            last.append(node)
            after.add(node)
            last = node


def _until(graph: fx.Graph, end: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    for node in graph.nodes:
        if node is end:
            return found
        found.append(node)
    return found
