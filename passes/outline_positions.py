"""Gather everything that depends on positions only: masks, rotary tables, learned positions, ALiBi.

before:  i = arange(S); …forty lines…; x = embedding(w, tokens) + p; a = attention_0(n, mask, cos, sin)
after:   p, mask, cos, sin = positions(tokens);  x = embedding(w, tokens) + p;  …

The region reads the *shape* of the tokens, never their values, so what it returns can be computed once per
length. Batch and sequence sizes that the rest of the graph reads stay in the root as well.

Assumes: attentions and feed-forwards are regions already.
Contract: exact.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from moec.ir import Pass, Program, Region
from moec.ir.dependence import token_dependent
from moec.ir.graphs import drop_unused, placeholder
from moec.ir.outline import outline, parameter_only, relative_names, tensors_read

aten = torch.ops.aten


@dataclass(frozen=True)
class OutlinePositions(Pass):
    """See the module."""

    def apply(self, program: Program) -> Program:
        root = program.graph
        weights, says = parameter_only(root.graph), token_dependent(root.graph)
        nodes = _positional(root.graph, says, weights)
        outputs = [n for n in nodes if isinstance(n.meta.get("val"), Tensor) and _leaves(n, set(nodes))]
        if not outputs:
            return program
        _outline(program, nodes, outputs, weights)
        drop_unused(root)
        return program


def _positional(graph: fx.Graph, says: set[fx.Node], weights: set[fx.Node]) -> list[fx.Node]:
    """Calls that need nothing but the shape of the tokens and weights."""
    known = {placeholder(graph), *weights}
    found = []
    for node in graph.nodes:
        if (
            node.op == "call_function"
            and node not in says
            and node not in weights
            and known.issuperset(node.all_input_nodes)
        ):
            found.append(node)
            known.add(node)
    return found


def _leaves(node: fx.Node, inside: set[fx.Node]) -> bool:
    return any(user not in inside for user in node.users)


def _outline(program: Program, nodes: list[fx.Node], outputs: list[fx.Node], weights: set[fx.Node]) -> None:
    root = program.graph
    targets = tensors_read(root, nodes, weights)
    public = {target: program.origins.public_name(target) for target in targets}
    relative = relative_names(public.values())
    region = Region(kind="positions", index=0)
    call, program.origins = outline(
        root, program.origins, nodes, region,
        inputs=[(placeholder(root.graph), "tokens")], outputs=outputs,
        name_weight=lambda target: relative[public[target]],
    )  # fmt: skip
    _move_to_the_top(root.graph, call)


def _move_to_the_top(graph: fx.Graph, call: fx.Node) -> None:
    """Positions need nothing but the tokens: they come first."""
    items = [user for user in call.users if user.target is operator.getitem]
    for node in [*reversed(items), call]:
        placeholder(graph).append(node)
