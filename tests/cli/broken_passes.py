"""Passes with one mistake each. All claim to be exact."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from moec.ir import Check, Pass, Program
from moec.ir.graphs import output
from moec.passes.lift_experts import LiftExperts

aten = torch.ops.aten


def first(program: Program, region: str, target: object) -> fx.Node:
    """The first call of `target` in a region ('' for the root)."""
    graph = program.graph.get_submodule(region).graph if region else program.graph.graph
    assert isinstance(graph, fx.Graph)
    return next(node for node in graph.nodes if node.target is target)


def done(program: Program) -> Program:
    for module in program.graph.modules():
        module.recompile() if isinstance(module, fx.GraphModule) else None
    return program


@dataclass(frozen=True)
class WrongActivation(Pass):
    """silu for gelu, inside of a region."""

    def apply(self, program: Program) -> Program:
        node = first(program, "ffn_1", aten.gelu.default)
        node.target, node.kwargs = aten.silu.default, {}
        return done(program)


@dataclass(frozen=True)
class WrongScale(Pass):
    """The second attention scores by another scale, before there are regions."""

    scale: float = 0.3

    def apply(self, program: Program) -> Program:
        attention = aten.scaled_dot_product_attention.default
        calls = [node for node in program.graph.graph.nodes if node.target is attention]
        calls[1].kwargs = {**calls[1].kwargs, "scale": self.scale}
        return done(program)


@dataclass(frozen=True)
class DroppedBias(Pass):
    """The last projection of the first attention forgets its bias."""

    def apply(self, program: Program) -> Program:
        module = program.graph.get_submodule("attention_0")
        assert isinstance(module, fx.GraphModule)
        nodes = [node for node in module.graph.nodes if node.target is aten.linear.default]
        nodes[-1].args = nodes[-1].args[:2]
        return done(program)


@dataclass(frozen=True)
class Detached(Pass):
    """Right values, no gradient for the second feed-forward."""

    def apply(self, program: Program) -> Program:
        module = program.graph.get_submodule("ffn_1")
        assert isinstance(module, fx.GraphModule)
        end = output(module.graph)
        with module.graph.inserting_before(end):
            end.args = (module.graph.call_function(aten.detach.default, end.args),)
        return done(program)


@dataclass(frozen=True)
class TinyError(Pass):
    """A head that is off in the ninth digit."""

    def apply(self, program: Program) -> Program:
        end = output(program.graph.graph)
        with program.graph.graph.inserting_before(end):
            end.args = (program.graph.graph.call_function(aten.mul.Tensor, (end.args[0], 1 + 1e-9)),)
        return done(program)


@dataclass(frozen=True)
class WrongShape(Pass):
    """A product whose sizes do not fit."""

    def apply(self, program: Program) -> Program:
        node = first(program, "ffn_0", aten.linear.default)
        last = [n for n in node.graph.nodes if n.target is aten.linear.default][-1]
        last.args = (last.args[0], node.args[1])
        return done(program)


@dataclass(frozen=True)
class Crash(Pass):
    """A mistake in Python."""

    def apply(self, program: Program) -> Program:
        return program.no_such_thing  # type: ignore[return-value]


@dataclass(frozen=True)
class FailedCheck(Pass):
    """Its own check does not hold."""

    def apply(self, program: Program) -> Program:
        return program

    def ensures(self, before: Program, after: Program) -> list[Check]:
        return [Check("ffn_1: gradients", 0.25, 1e-10, worst="up.weight")]


@dataclass(frozen=True)
class LoudExperts(LiftExperts):
    """Experts that come out half as loud again."""

    def apply(self, program: Program) -> Program:
        program = super().apply(program)
        node = first(program, "moe_1", torch.ops.moec.combine.default)
        with node.graph.inserting_after(node):
            loud = node.graph.call_function(aten.mul.Tensor, (node, 1.5))
        node.replace_all_uses_with(loud, delete_user_cb=lambda user: user is not loud)
        return done(program)


@dataclass(frozen=True)
class Honest(Pass):
    """Moves values, renames them, splits a sum: nothing is different."""

    def apply(self, program: Program) -> Program:
        for place, node in enumerate(program.graph.graph.nodes):
            if node.op == "call_function":
                node.name = f"renamed_{place}"
        node = first(program, "ffn_1", aten.gelu.default)
        with node.graph.inserting_after(node):
            negated = node.graph.call_function(aten.neg.default, (node,))
        with node.graph.inserting_after(negated):
            again = node.graph.call_function(aten.neg.default, (negated,))
        node.replace_all_uses_with(again, delete_user_cb=lambda user: user is not negated)
        return done(program)
