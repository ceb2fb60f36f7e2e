"""Take out of a decoder what acts while training alone.

before:  d = dropout(a, 0.1, self.training);  read = detach(tokens)
         jittered = moec.jitter(read, epsilon=0.01, training=self.training)
         … moec.gate(jittered, …, training=self.training)
after:   … moec.gate(tokens, …, training=False)

Assumes: stage *cached*, which is for use and never trained.
Contract: exact in evaluation mode, which is all there is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

import moec.runtime.ops  # noqa: F401 - registers torch.ops.moec
from moec.ir import Check, Pass, Program
from moec.ir.graphs import drop_unused, graph_modules
from moec.ir.patterns import is_call, replace

from .prove_fusion import prove_fusion

aten = torch.ops.aten
WHILE_TRAINING = (aten.dropout.default, aten.detach.default, torch.ops.moec.jitter.default)


@dataclass(frozen=True)
class SettleTraining(Pass):
    """See the module."""

    def apply(self, program: Program) -> Program:
        for _, module in graph_modules(program.graph):
            for node in list(module.graph.nodes):
                if is_call(node, *WHILE_TRAINING):
                    assert isinstance(node.args[0], fx.Node)
                    replace(node, node.args[0])
            for node in [n for n in module.graph.nodes if n.op == "get_attr" and n.target == "training"]:
                _settle(node)
            drop_unused(module)
        return program

    def ensures(self, before: Program, after: Program) -> list[Check]:
        """A step gives what it gave."""
        return prove_fusion(before, after)


def _settle(flag: fx.Node) -> None:
    """Write False wherever `self.training` was read."""
    for user in list(flag.users):
        user.args, user.kwargs = fx.node.map_arg(
            (user.args, user.kwargs), lambda n: False if n is flag else n
        )
