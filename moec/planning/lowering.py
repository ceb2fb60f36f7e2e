"""Costs of arrangements: lowered once for every shape of a mesh, then only the numbers of ranks are put in.

Two arrangements have the same shape when the program of one rank is the same text for both, but for numbers:
the same axes have more than one rank, rows travel in the same way, and the same of the dense part is dealt
out. A cost has the numbers of ranks as letters, so the first of a shape tells the cost of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import sympy

from moec import ir
from moec.cost.cost import Cost
from moec.cost.rank.weights import Weights
from moec.cost.reading.read import read_graph
from moec.cost.reading.routing import Routing
from moec.cost.shown.lambdified import Numbers, lambdified
from moec.cost.step.phases import TrainingStep, head_of, inference_operations, training_operations
from moec.cost.timing.arranged import arranged
from moec.decoder import DEFAULT_LENGTH
from moec.foresight import Phase
from moec.ir.mesh import ExpertAxes, Mesh
from moec.ir.shapes import Shared, shapes_shared
from moec.ir.stand_in import with_stand_ins, without_stand_ins
from moec.passes.pipeline import cached, fused, fused_decoder, partitioned, placed
from moec.passes.place_dense import logits_split
from moec.passes.runner import Runner
from moec.plan import Parallel, Plan, Train
from moec.program import Program

from .arrangements import Space, mesh_of, ways_of_rows
from .folding import Folding
from .segments import number_of, segments_of
from .space import dealt_out
from .unfolding import unfolded, unfolded_weights


class Shape:
    """What was lowered once: its `cost`, whose memory is computed for any letters."""

    def __init__(self, cost: Cost) -> None:
        self.cost = cost

    @cached_property
    def _parts(self) -> dict[str, tuple[Callable[..., Numbers], list[str]]]:
        memory, found = self.cost.memory, {}
        for name, amount in {**memory.parts, "total": memory.total}.items():
            letters = sorted(map(str, sympy.sympify(amount).free_symbols))
            found[name] = lambdified(amount, letters), letters
        return found

    def memory(self, letters: Mapping[str, int]) -> dict[str, int]:
        """Bytes of one rank by part, and in `total`, as `Memory.numbers` has them."""
        given = {**self.cost.mesh.axes(), **letters}
        return {
            name: math.ceil(float(compute(*(given[letter] for letter in names))))
            for name, (compute, names) in self._parts.items()
        }


@dataclass(frozen=True)
class Arranged:
    """The cost of an arrangement: that of its `shape`, and the numbers of ranks that its letters have there:
    `axes` those that are free, `ranks` all of them."""

    shape: Shape
    axes: dict[str, int]
    ranks: dict[str, int]

    @property
    def cost(self) -> Cost:
        """In letters."""
        return self.shape.cost

    def memory(self, letters: Mapping[str, int]) -> dict[str, int]:
        """Bytes of one rank by part, and in `total`, for these batch and sequence."""
        return self.shape.memory({**self.ranks, **letters})


class Lowering:
    """Costs of one program in one `phase`; `shapes`: those lowered so far."""

    def __init__(
        self,
        folding: Folding,
        space: Space,
        phase: Phase,
        *,
        train: Train | None = None,
        routing: Routing | None = None,
    ) -> None:
        self.folding, self.space, self.phase, self.routing = folding, space, phase, routing
        self.step = TrainingStep.of(train or Train())
        self.shapes: dict[Hashable, Shape] = {}
        self._known: Shared = {}
        self._dealt: dict[int, Hashable] = {}

    def cost(self, parallel: Parallel) -> Arranged:
        """The cost of the whole program, arranged so."""
        shape = self.shape(parallel)
        if shape not in self.shapes:
            self.shapes[shape] = Shape(self._lowered(parallel))
        found, mesh = self.shapes[shape], mesh_of(self.space, parallel)
        axes = axes_between(found.cost.mesh, mesh)
        return Arranged(found, axes, arranged(found.cost.mesh, axes).numbers)

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
        folding, training = self.folding, self.phase == "training"
        with shapes_shared(self._known):
            placed, read = programs_of_rank(folding.program, parallel, self.space.world, self.phase)
        reading = read_graph(read.graph, read.layout, training=training, routing=self.routing)
        weights = Weights.of(read)
        if folding.folded:
            numbers = [number_of(regions) for regions in folding.regions]
            segments = segments_of(read.graph, reading.operations)
            reading = unfolded(reading, segments, folding.stands_for, numbers)
            weights = unfolded_weights(weights, segments, folding.stands_for)
        mesh, head = mesh_of(self.space, parallel), head_of(reading, logits_split(placed))
        weights = replace(weights, mesh=mesh)
        if training:
            operations = training_operations(reading, head, weights, self.step)
            return Cost(operations, self.phase, mesh, weights, self.step)
        cache = sympy.Add(*(value.bytes for value in reading.inputs[3:]))
        return Cost(inference_operations(reading, head), self.phase, mesh, weights, cache=cache)


def programs_of_rank(
    program: Program, parallel: Parallel, world: int, phase: Phase
) -> tuple[ir.Program, ir.Program]:
    """The program of rank 0 of `world`, and what of it runs in `phase`: to be read, not to be run.

    The same passes as `program.partition(0)` and its decoder run, on a fork, without keeping stages and
    without copies of weights.
    """
    runner = Runner(verify="off", in_place=True)
    local = runner.run(program.fork(), placed(Plan(parallel=parallel), world))
    if local.layout is not None:
        local.rank = 0
        local = runner.run(local, partitioned(0))
    if phase == "decode":
        length = program.source.max_positions or DEFAULT_LENGTH
        derived = runner.run(with_stand_ins(local.fork()), cached(length))
        return local, runner.run(without_stand_ins(derived).eval(), fused_decoder()).eval()
    if program.backend == "fused":
        return local, runner.run(local.fork(), fused())
    return local, local


def axes_between(lowered: Mesh, asked: Mesh) -> dict[str, int]:
    """Letters of the axes of `lowered` that are free → their ranks in `asked`."""
    found = {"data": asked.data, "tensor": asked.tensor}
    for (_, axes), (_, wanted) in zip(lowered.layers, asked.layers, strict=True):
        found |= {axes.expert_axis: wanted.expert, axes.slice_axis: wanted.slice}
    return found


def _more_than_one(axes: ExpertAxes) -> tuple[bool, bool, bool]:
    return axes.data > 1, axes.expert > 1, axes.slice > 1
