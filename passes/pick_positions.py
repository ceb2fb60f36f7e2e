"""Compute the logits of the wanted positions only.

before:  n = rms_norm(x_1b, w);  logits = linear(n, head)                            # [B, n, V]
after:   where = expand(unsqueeze(wanted, -1), [-1, -1, D]);  picked = gather(x_1b, 1, where)   # [B, m, D]
         n = rms_norm(picked, w);  logits = linear(n, head)                          # [B, m, V]

The head of a language model is its largest product, and decoding reads one position of it. The place is the
earliest value that everything after reads alone: before the last norm, as a rule.

Assumes: `derive_cache` ran: everything outside attention acts position by position, and dim 1 of what is
picked are the positions.
Contract: exact for the wanted positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from moec.ir import Check, Pass, Program
from moec.ir.dependence import token_dependent
from moec.ir.graphs import output
from moec.ir.identity import made_from
from moec.ir.patterns import same_size, tensor

from .prove_cached import prove_picked

aten = torch.ops.aten


@dataclass(frozen=True)
class PickPositions(Pass):
    """See the module."""

    makes: ClassVar[str] = "cached"

    def apply(self, program: Program) -> Program:
        graph = program.graph.graph
        wanted = next(node for node in graph.nodes if node.op == "placeholder" and node.name == "wanted")
        value = _earliest(graph)
        with graph.inserting_after(value):
            column = graph.call_function(aten.unsqueeze.default, (wanted, -1))
        with graph.inserting_after(column):
            index = graph.call_function(aten.expand.default, (column, [-1, -1, _width(value)]))
        with graph.inserting_after(index):
            picked = made_from(graph.call_function(aten.gather.default, (value, 1, index)), value, taking=())
        column.name, index.name, picked.name = "column", "index", "picked"
        value.replace_all_uses_with(picked, delete_user_cb=lambda user: user is not picked)
        program.graph.recompile()
        return program

    def ensures(self, before: Program, after: Program) -> list[Check]:
        """Asked for some positions, out of order and twice, the program gives the logits of these."""
        return prove_picked(before, after)


def _width(value: fx.Node) -> int:
    known = tensor(value)
    assert known is not None
    return int(known.shape[-1])


def _earliest(graph: fx.Graph) -> fx.Node:
    """The first value [B, n, D] that the logits depend on alone."""
    tokens = next(node for node in graph.nodes if node.op == "placeholder")
    says, sizes = token_dependent(graph), tensor(tokens)
    assert sizes is not None
    value = output(graph).args[0]
    assert isinstance(value, fx.Node)
    best = value
    while True:
        sources = [node for node in value.all_input_nodes if node in says]
        if value.op != "call_function" or len(sources) != 1:
            return best
        (value,) = sources
        shape = tensor(value)
        alone = len(value.users) == 1
        if alone and shape is not None and shape.dim() == 3 and same_size(shape.shape[1], sizes.shape[1]):
            best = value
        elif not alone:
            return best
