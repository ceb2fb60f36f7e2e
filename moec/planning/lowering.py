"""Costs of arrangements: lowered once for every shape of a mesh, then only the numbers of ranks are put in.

Two arrangements have the same shape when the program of one rank is the same text for both, but for numbers:
the same axes have more than one rank, rows travel in the same way, and the same of the dense part is dealt
out. A cost has the numbers of ranks as letters, so the first of a shape tells the cost of all.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

from moec.api import place
from moec.cost.cost import Cost
from moec.cost.read import read_operations
from moec.foresight import Phase, graph_of
from moec.ir.mesh import ExpertAxes, Mesh
from moec.plan import Parallel, Plan
from moec.program import Program

from .arrangements import Space, mesh_of, ways_of_rows
from .folding import Folding
from .segments import number_of, segments_of
from .space import dealt_out
from .unfolding import unfolded


@dataclass(frozen=True)
class Arranged:
    """The cost of an arrangement: `cost`, and the numbers of ranks that its letters have there."""

    cost: Cost
    axes: dict[str, int]


class Lowering:
    """Costs of one program in one `phase`; `shapes`: those lowered so far."""

    def __init__(self, folding: Folding, space: Space, phase: Phase) -> None:
        self.folding, self.space, self.phase = folding, space, phase
        self.shapes: dict[Hashable, Cost] = {}
        self._dealt: dict[int, Hashable] = {}

    def cost(self, parallel: Parallel) -> Arranged:
        """The cost of the whole program, arranged so."""
        shape = self.shape(parallel)
        if shape not in self.shapes:
            self.shapes[shape] = self._lowered(parallel)
        found, mesh = self.shapes[shape], mesh_of(self.space, parallel)
        return Arranged(found, axes_between(found.mesh, mesh))

    def shape(self, parallel: Parallel) -> Hashable:
        """What programs of one shape have in common."""
        mesh, ways = mesh_of(self.space, parallel), ways_of_rows(self.space, parallel)
        if mesh.tensor not in self._dealt:
            self._dealt[mesh.tensor] = dealt_out(self.folding.program, mesh.tensor)
        factors = list(mesh.expert_axes)
        layers = [
            (factors.index(axes), *_more_than_one(axes), way)
            for (_, axes), way in zip(mesh.layers, ways, strict=True)
        ]
        return mesh.data > 1, mesh.tensor > 1, self._dealt[mesh.tensor], tuple(layers)

    def _lowered(self, parallel: Parallel) -> Cost:
        folding, world = self.folding, self.space.world
        program = Program.of(folding.program.fork())
        program.plan = (program.plan or Plan()).model_copy(update={"parallel": parallel})
        local = graph_of(place(program, world), self.phase)
        operations = read_operations(local.graph, local.layout, training=self.phase == "training")
        if folding.folded:
            numbers = [number_of(regions) for regions in folding.regions]
            segments = segments_of(local.graph, operations)
            operations = unfolded(operations, segments, folding.stands_for, numbers)
        return Cost(operations, self.phase, replace(mesh_of(self.space, parallel)))


def axes_between(lowered: Mesh, asked: Mesh) -> dict[str, int]:
    """Letters of the axes of `lowered` that are free → their ranks in `asked`."""
    found = {"data": asked.data, "tensor": asked.tensor}
    for (_, axes), (_, wanted) in zip(lowered.layers, asked.layers, strict=True):
        found |= {axes.expert_axis: wanted.expert, axes.slice_axis: wanted.slice}
    return found


def _more_than_one(axes: ExpertAxes) -> tuple[bool, bool, bool]:
    return axes.data > 1, axes.expert > 1, axes.slice > 1
