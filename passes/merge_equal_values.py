"""Compute equal values once.

before:  a = arange(S);  b = arange(S);  y = f(a) + g(b)
after:   a = arange(S);  y = f(a) + g(a)

Models rebuild masks and rotary tables in every layer; after this pass there is one of each.
Assumes: no operator writes in place. Random operators are never merged.
Contract: exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moec.ir import Pass, Program
from moec.ir.dependence import token_dependent
from moec.ir.graphs import drop_unused


@dataclass(frozen=True)
class MergeEqualValues(Pass):
    """See the module."""

    def apply(self, program: Program) -> Program:
        graph = program.graph.graph
        _merge_weights(graph)
        says, seen = token_dependent(graph), dict[Any, fx.Node]()
        for node in list(graph.nodes):
            # Values that carry tokens differ from layer to layer; merging them would only tangle the layers.
            if node.op != "call_function" or node in says or is_random(node):
                continue
            first = seen.setdefault(_key(node), node)
            if first is not node:
                node.replace_all_uses_with(first, propagate_meta=False)
                graph.erase_node(node)
        drop_unused(program.graph)
        return program


def _merge_weights(graph: fx.Graph) -> None:
    seen: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "get_attr":
            first = seen.setdefault(str(node.target), node)
            if first is not node:
                node.replace_all_uses_with(first, propagate_meta=False)
                graph.erase_node(node)


def is_random(node: fx.Node) -> bool:
    """Whether a call draws random numbers."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


def _key(node: fx.Node) -> Any:
    return node.target, _freeze(node.args), _freeze(node.kwargs)


def _freeze(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(v) for v in value)
    if isinstance(value, dict):
        return tuple(sorted((k, _freeze(v)) for k, v in value.items()))
    return (type(value).__name__, value)
