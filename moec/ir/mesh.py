"""How the ranks of a job are arranged: named axes, and which ranks form a group along each.

The dense part factors the world as data × tensor, each expert layer factors the same world anew as
expert-data × expert × slice (the paper's multi-expert, multi-data parallelism). The last axis of each product
runs fastest, so ranks of one tensor group, and ranks that share one expert, are neighbours:

    rank = d · tensor + t                            rank = (ed · expert + e) · slice + s

A second program on the same ranks (a teacher beside its student) may be arranged otherwise. Its mesh then has
a name, which stands before those of its axes, `teacher_tensor`, so that the axes of both can be told apart.

Pure arithmetic: no process, no tensor, nothing of torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from moec.errors import MeshError

WORLD, DATA, TENSOR = "world", "data", "tensor"


@dataclass(frozen=True, order=True)
class ExpertAxes:
    """How one expert layer factors the world: `data` groups of ranks that hold the same experts, `expert`
    ranks that the experts are dealt out to, `slice` ranks that share each expert."""

    data: int
    expert: int = 1
    slice: int = 1

    @property
    def _suffix(self) -> str:
        return f"{self.expert}" if self.slice == 1 else f"{self.expert}x{self.slice}"

    @property
    def expert_axis(self) -> str:
        """The axis that rows travel along to their experts: `expert_8`."""
        return f"expert_{self._suffix}"

    @property
    def slice_axis(self) -> str:
        """The axis of ranks that share one expert: `slice_8x2`."""
        return f"slice_{self._suffix}"

    @property
    def data_axis(self) -> str:
        """The axis of ranks that hold the same (slice of the same) experts: `expert_data_8`."""
        return f"expert_data_{self._suffix}"

    @property
    def alike_axis(self) -> str:
        """The axis of ranks that have the same place on the expert axis, whatever their slice: what holds a
        weight that is dealt out by expert and not sliced: `expert_alike_8x2`."""
        return f"expert_alike_{self._suffix}"

    @property
    def inside_axis(self) -> str:
        """The part of the expert axis that lies inside a node: `expert_8_inside`."""
        return f"{self.expert_axis}_inside"

    @property
    def between_axis(self) -> str:
        """The part of the expert axis that runs between nodes: `expert_8_between`."""
        return f"{self.expert_axis}_between"

    def __str__(self) -> str:
        return f"expert-data {self.data} × expert {self.expert} × slice {self.slice}"


@dataclass(frozen=True)
class Mesh:
    """`data` × `tensor` ranks, `node` neighbouring ranks to a machine, and how expert layers factor them.

    `layers`: expert layer (`moe_3`) → its axes; each has as many ranks as the world. `name` stands before the
    names of all axes but the world's. `beside`: other meshes over the same ranks, whose axes are known too.
    """

    data: int = 1
    tensor: int = 1
    node: int = 8
    layers: tuple[tuple[str, ExpertAxes], ...] = ()
    name: str = ""
    beside: tuple[Mesh, ...] = ()

    @property
    def world(self) -> int:
        """The number of ranks."""
        return self.data * self.tensor

    def axes_of(self, layer: str) -> ExpertAxes:
        """The axes of the expert layer `moe_3`."""
        return dict(self.layers)[layer]

    @property
    def expert_axes(self) -> tuple[ExpertAxes, ...]:
        """The distinct factorisations, in order; layers of the same one share their groups."""
        return tuple(dict.fromkeys(axes for _, axes in self.layers))

    def named(self, name: str) -> Mesh:
        """The same mesh with another name."""
        return replace(self, name=name)

    def joined(self, other: Mesh) -> Mesh:
        """This mesh, which knows the axes of `other` too: what both programs are connected by.

        Raises `MeshError` where they are not over as many ranks, or an axis of one name means other ranks.
        """
        if other.world != self.world:
            raise MeshError("mesh", f"{other} beside {self}", "meshes over the same ranks")
        theirs = other._all_loops
        for axis, loops in self._all_loops.items():
            if theirs.get(axis, loops) != loops:
                found = f"an axis {axis!r} of {self} and another one of {other}"
                raise MeshError("mesh", found, "axes that can be told apart", 'a name: mesh.named("teacher")')
        return replace(self, beside=(*self.beside, other))

    def axis(self, axis: str) -> str:
        """The name that this mesh has for its `axis`: `teacher_data` for `data`."""
        return f"{self.name}_{axis}" if self.name and axis != WORLD else axis

    def axes(self) -> dict[str, int]:
        """Every axis by name, with its number of ranks; those of one rank included."""
        return {axis: math.prod(count for _, count in loops) for axis, loops in self._all_loops.items()}

    def inside(self, axes: ExpertAxes) -> int:
        """How many consecutive ranks of an expert axis share a node: a divisor of the axis, 1 when none do.

        Ranks of the axis are `slice` apart, so a node of 8 holds 4 of them when slice is 2.
        """
        held = max(1, self.node // axes.slice)
        return math.gcd(axes.expert, held) if self.world > self.node else axes.expert

    def coordinate(self, axis: str, rank: int) -> int:
        """The place of `rank` in its group along `axis` (with the mesh's name or without)."""
        place = 0
        for stride, count in self._loops(axis):
            place = place * count + rank // stride % count
        return place

    def coordinates(self, rank: int) -> dict[str, int]:
        """The place of `rank` along every axis."""
        return {axis: self.coordinate(axis, rank) for axis in self.axes()}

    def group(self, axis: str, rank: int) -> tuple[int, ...]:
        """The ranks of the group of `rank` along `axis`, in the order of the axis."""
        loops = self._loops(axis)
        first = rank - sum(rank // stride % count * stride for stride, count in loops)
        steps = itertools.product(*(range(0, stride * count, stride) for stride, count in loops))
        return tuple(first + sum(step) for step in steps)

    def groups(self, axis: str) -> list[tuple[int, ...]]:
        """Every group along `axis`; together they hold each rank once."""
        return sorted({self.group(axis, rank) for rank in range(self.world)})

    def _loops(self, axis: str) -> list[tuple[int, int]]:
        """What a group along `axis` runs over: (distance between neighbours, number of them), slowest
        first."""
        known = self._all_loops
        if axis not in known:
            axis = self.axis(axis)
        if axis not in known:
            raise KeyError(f"no axis {axis!r}; there are {', '.join(known)}")
        return known[axis]

    @cached_property
    def _all_loops(self) -> dict[str, list[tuple[int, int]]]:
        own = {self.axis(axis): loops for axis, loops in self._own_loops().items()}
        return own | {axis: loops for other in self.beside for axis, loops in other._all_loops.items()}

    def _own_loops(self) -> dict[str, list[tuple[int, int]]]:
        found = {WORLD: [(1, self.world)], DATA: [(self.tensor, self.data)], TENSOR: [(1, self.tensor)]}
        for axes in self.expert_axes:
            inside, held = self.inside(axes), axes.slice * axes.expert
            found |= {
                axes.slice_axis: [(1, axes.slice)],
                axes.expert_axis: [(axes.slice, axes.expert)],
                axes.data_axis: [(held, axes.data)],
                axes.alike_axis: [(held, axes.data), (1, axes.slice)],
                axes.inside_axis: [(axes.slice, inside)],
                axes.between_axis: [(axes.slice * inside, axes.expert // inside)],
            }
        return found

    def to_json(self) -> dict[str, object]:
        """As plain data; `of_json` reads it back. A name is not kept, nor is what stands beside."""
        layers = {name: [axes.data, axes.expert, axes.slice] for name, axes in self.layers}
        return {"data": self.data, "tensor": self.tensor, "node": self.node, "layers": layers}

    @classmethod
    def of_json(cls, record: Mapping[str, object]) -> Mesh:
        """The mesh that `to_json` wrote."""
        layers = record["layers"]
        assert isinstance(layers, Mapping)
        data, tensor, node = (int(str(record[key])) for key in ("data", "tensor", "node"))
        return cls(data, tensor, node, tuple((name, ExpertAxes(*sizes)) for name, sizes in layers.items()))

    def __str__(self) -> str:
        return f"{self.world} ranks: data {self.data} × tensor {self.tensor}"
