"""Give the axes of a rank's program the name of its mesh.

before:  summed = _c10d_functional.all_reduce(part, reduce_op="sum", group_name="tensor")
after:   summed = _c10d_functional.all_reduce(part, reduce_op="sum", group_name="teacher_tensor")

Two programs that are arranged differently run on the same ranks so: each finds the groups of its own axes.
The axis of all ranks keeps its name. The weights are shared.

Assumes: nothing; a graph says an axis as the argument `axis` or `group_name`, and nowhere else.
Contract: exact.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from torch import fx
from torch._ops import OpOverload

from moec.errors import PassError
from moec.ir import Pass, Program
from moec.ir.graphs import graph_modules
from moec.ir.mesh import WORLD, Mesh

ARGUMENTS = ("axis", "group_name")


@dataclass(frozen=True)
class NameAxes(Pass):
    """See the module. `mesh_name`: stands before the names of all axes."""

    mesh_name: str
    contract: ClassVar[str] = "exact"

    def requires(self, program: Program) -> None:
        """A program of ranks whose mesh has no name yet."""
        if program.layout is None:
            raise PassError("name_axes", "a program without a mesh", "the part of a rank")
        if program.layout.mesh.name:
            raise PassError("name_axes", f"a mesh called {program.layout.mesh.name!r}", "one without a name")

    def apply(self, program: Program) -> Program:
        """See the module."""
        assert program.layout is not None
        old = program.layout.mesh
        program.layout = program.layout.named(self.mesh_name)
        for _, module in graph_modules(program.graph):
            for node in module.graph.nodes:
                if isinstance(node.target, OpOverload):
                    _rename(node, program.layout.mesh)
                said = node.meta.get("placement")
                if said:
                    node.meta["placement"] = _retold(said, old, program.layout.mesh)
            module.recompile()
        return program


def _rename(node: fx.Node, mesh: Mesh) -> None:
    """Change the names of axes among the arguments of a call."""
    assert isinstance(node.target, OpOverload)
    for place, argument in enumerate(node.target._schema.arguments):
        if argument.name not in ARGUMENTS:
            continue
        if place < len(node.args) and node.args[place]:
            node.update_arg(place, mesh.axis(str(node.args[place])))
        elif node.kwargs.get(argument.name):
            node.update_kwarg(argument.name, mesh.axis(str(node.kwargs[argument.name])))


def _retold(said: str, old: Mesh, mesh: Mesh) -> str:
    """The remark at the right of a line, with the new names in it."""
    axes = sorted((axis for axis in old.axes() if axis != WORLD), key=len, reverse=True)
    return re.sub(rf"\b({'|'.join(axes)})\b", lambda found: mesh.axis(found[1]), said)
